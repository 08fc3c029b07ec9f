"""Tokenizers: load, fingerprint, encode prompts and chats, find the tokens that end a response.

It is not a tokenizer: Hugging Face's fast tokenizers do the work. Ids go on to `packing`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from blake3 import blake3
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trimtab.models.errors import ModelLoadError


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a folder or hub id; ModelLoadError when it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except Exception as error:
        raise ModelLoadError("tokenizer", f"{source}: no usable tokenizer ({first_line(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError("tokenizer", f"{source}: a fast tokenizer (tokenizer.json) is required")
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that decides which ids a text becomes; equal digests mean equal ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    state.pop("padding", None)
    state.pop("truncation", None)
    return "blake3:" + blake3(json.dumps(state, sort_keys=True).encode()).hexdigest()


def eos_token_ids(config: Any, generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: the generation config's, else the model config's, else the tokenizer's."""
    for value in (
        getattr(generation_config, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            return tuple(int(token) for token in (value if isinstance(value, list | tuple) else (value,)))
    return ()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> np.ndarray:
    """Ids (int32) of a text as `tokenizer.encode` gives them, by its Rust core at once: a tenth of the time."""
    core: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    if core.truncation is not None:
        core.no_truncation()
    if core.padding is not None:
        core.no_padding()
    return np.asarray(core.encode(text, add_special_tokens=special).ids, dtype=np.int32)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Ids (int32) of a prompt, with the special tokens the tokenizer puts in front (but no end token behind)."""
    ids = encode(tokenizer, text, special=True)
    if len(ids) < 2 or ids[-1] != tokenizer.eos_token_id:
        return ids
    bare = encode(tokenizer, text, special=False)
    return ids if bare.size and bare[-1] == tokenizer.eos_token_id else ids[:-1]


def encode_continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[np.ndarray, int]:
    """Ids of prompt + response as one text, and how many of them are the prompt's.

    The prompt's own ids are kept and the response's are those of the joint text behind them wherever
    the joint text splits there; where a token would straddle the border the response is encoded alone.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    joint = encode_prompt(tokenizer, prompt + response)
    if joint.size >= prompt_ids.size and np.array_equal(joint[: prompt_ids.size], prompt_ids):
        return joint, int(prompt_ids.size)
    tail = encode(tokenizer, response, special=False)
    return np.concatenate([prompt_ids, tail]), int(prompt_ids.size)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
) -> np.ndarray:
    """Ids (int32) of a conversation through the tokenizer's own chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; send text instead")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise ValueError(f"the chat template refused the messages: {first_line(error)}") from error
    return encode(tokenizer, str(text), special=False)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: np.ndarray) -> str:
    """Text of response tokens, special tokens left out."""
    return str(tokenizer.decode(token_ids.tolist(), skip_special_tokens=True))


def decode_continuation(tokenizer: PreTrainedTokenizerBase, prompt_ids: np.ndarray, token_ids: np.ndarray) -> str:
    """Text that the response adds behind its prompt (keeps the space at the border)."""
    head = decode(tokenizer, prompt_ids)
    whole = decode(tokenizer, np.concatenate([prompt_ids, token_ids]))
    return whole[len(head) :] if whole.startswith(head) else decode(tokenizer, token_ids)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message, at most 300 characters."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]

"""Prompts and conversations as callers hold them, as messages of the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trimtab_client.ragged import encode_ids
from trimtab_client.v1 import generator_pb2, tokens_pb2

ChatMessage = Mapping[str, str]
"""{"role": ..., "content": ...}"""

Prompt = str | Sequence[int] | np.ndarray | Sequence[ChatMessage]
"""Text, token ids, or chat messages that the server renders by the model's own template."""

# Text is measured by its UTF-8 bytes, since a tokenizer makes at most one token of a byte; the special tokens around a
# text, or a template around a chat message, add at most this many.
TEMPLATE_TOKENS = 32


def most_tokens(prompt: Prompt) -> int:
    """No fewer than the tokens that a server makes of a prompt; exact for ids."""
    if isinstance(prompt, str):
        return text_tokens(prompt)
    if len(prompt) and isinstance(prompt[0], Mapping):
        return chat_tokens(prompt)  # type: ignore[arg-type]
    return len(prompt)


def text_tokens(text: str) -> int:
    """No fewer than the tokens of a text."""
    return len(text.encode(errors="surrogatepass")) + TEMPLATE_TOKENS


def chat_tokens(messages: Sequence[ChatMessage]) -> int:
    """No fewer than the tokens of a conversation with its template."""
    return TEMPLATE_TOKENS + sum(text_tokens(message["role"]) + text_tokens(message["content"]) for message in messages)


def prompt_to_proto(prompt: Prompt, seeds: Sequence[int]) -> generator_pb2.Prompt:
    """A prompt with one seed a sample as it travels."""
    if isinstance(prompt, str):
        return generator_pb2.Prompt(text=prompt, seeds=seeds)
    if len(prompt) and isinstance(prompt[0], Mapping):
        return generator_pb2.Prompt(chat=conversation_to_proto(prompt), seeds=seeds)  # type: ignore[arg-type]
    return generator_pb2.Prompt(token_ids=encode_ids(prompt), seeds=seeds)  # type: ignore[arg-type]


def conversation_to_proto(messages: Sequence[ChatMessage]) -> tokens_pb2.Conversation:
    """A conversation as it travels; ValueError for a message without role and content."""
    for message in messages:
        if "role" not in message or "content" not in message:
            raise ValueError(f"a chat message needs role and content, got the keys {sorted(message)}")
    return tokens_pb2.Conversation(
        messages=[tokens_pb2.ChatMessage(role=message["role"], content=message["content"]) for message in messages]
    )

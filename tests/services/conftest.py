"""Tiny random models as Hugging Face folders, for tests of real servers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{i}" for i in range(45)]
CHAT = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
MakeModel = Callable[..., Path]


def _save_tokenizer(folder: Path, *, words: list[str], chat: bool) -> int:
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<unk>", "user", "assistant", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory) -> MakeModel:
    """make_tiny("policy" | "reward", seed=0, chat=True, words=…, edit=fn(model), **config): a folder; bos 0, eos 1."""

    def make(
        kind: str,
        *,
        seed: int = 0,
        chat: bool = True,
        words: list[str] | None = None,
        edit: Callable[[torch.nn.Module], None] | None = None,
        **settings,
    ) -> Path:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"tiny-{kind}")
        config = LlamaConfig(
            vocab_size=_save_tokenizer(folder, words=words or WORDS, chat=chat),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            initializer_range=0.2,
            **({"num_labels": 1} if kind == "reward" else {}),
            **settings,
        )
        model = LlamaForSequenceClassification(config) if kind == "reward" else LlamaForCausalLM(config)
        if edit is not None:
            edit(model)
        model.save_pretrained(folder)
        return folder

    return make

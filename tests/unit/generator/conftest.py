"""Tiny random models, a byte tokenizer and an engine's runs to the end, for the generator's tests.

Tests reach all of it through the fixture `lab`, which is this module.
"""

import sys
from collections.abc import Callable, Iterable
from types import ModuleType

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trimtab.generator.engine import FinishedSequence, Outcome, Sampling, SequenceRequest
from trimtab.generator.local.scheduler import LocalEngine
from trimtab_client.versions import ModelVersion

VOCAB_SIZE = 260
EOS = 257
V1 = ModelVersion(run_id="run", name="policy", step=1, digest="blake3:01")
V2 = ModelVersion(run_id="run", name="policy", step=2, digest="blake3:02")

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, eos_token_id=EOS,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=EOS)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        )
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=8, max_position_embeddings=128,
        )
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32,
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4)),
}  # fmt: skip


def build(name: str, seed: int = 0, scale: float = 3.0) -> PreTrainedModel:
    """A tiny random model whose weights are large enough that its distributions are far from flat."""
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0-255 are bytes; 256 begins, 257 ends, 258 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def lab() -> ModuleType:
    return sys.modules[__name__]


def engine_of(model: PreTrainedModel, *, max_slots: int = 4, max_length: int = 128, **options: object) -> LocalEngine:
    settings = {"eos_token_ids": (EOS,), "version": V1, **options}
    return LocalEngine(model, byte_tokenizer(), max_slots=max_slots, max_length=max_length, **settings)  # type: ignore[arg-type]


def request(sequence_id: int, prompt: Iterable[int], *, seed: int = 0, **sampling: object) -> SequenceRequest:
    settings = {"max_tokens": 12, "ignore_eos": True, **sampling}
    return SequenceRequest(
        sequence_id=sequence_id,
        prompt_ids=np.array(list(prompt), dtype=np.int32),
        prompt_key=sequence_id,
        seed=seed,
        sampling=Sampling(**settings),  # type: ignore[arg-type]
    )


def run(engine: LocalEngine, requests: list[SequenceRequest]) -> dict[int, FinishedSequence]:
    """Submit and step to the end; every sequence must finish."""
    engine.submit(requests)
    outcomes: list[Outcome] = []
    while engine.has_work:
        outcomes += engine.step()
    finished = {outcome.sequence_id: outcome for outcome in outcomes if isinstance(outcome, FinishedSequence)}
    assert len(finished) == len(outcomes), outcomes
    return finished


def random_prompts(count: int, *, longest: int = 20, seed: int = 0) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 256, draws.integers(1, longest + 1), dtype=np.int32) for _ in range(count)]


@torch.inference_mode()
def full_logprobs(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, temperature: float) -> np.ndarray:
    """The oracle: one forward of prompt and response without a cache; float32 [tokens of the response]."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / (temperature or 1.0)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return chosen.numpy()

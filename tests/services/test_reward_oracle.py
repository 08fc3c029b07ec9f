"""Served scores against transformers' own padded forward, for the shapes of models that reward models have."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from tests.services.reward_room import serving
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel

PAD = 1  # <eos>, which the sequences below never hold
WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SHAPES: dict[str, Callable[..., PretrainedConfig]] = {
    "llama": lambda **shared: LlamaConfig(**WIDTHS, **shared),
    "qwen3": lambda **shared: Qwen3Config(**WIDTHS, **shared),
    "gpt2": lambda **shared: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared),
    "gemma": lambda **shared: GemmaConfig(**WIDTHS, **shared),
    "gemma2": lambda **shared: Gemma2Config(**WIDTHS, sliding_window=8, query_pre_attn_scalar=8, **shared),
}
REAL = Path("examples/models/stories260K-hf")


def sequences(count: int, vocabulary: int = 50, seed: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocabulary, size).tolist() for size in rng.integers(1, 60, count)]


@pytest.fixture(scope="module")
def make_shape(make_tiny, tmp_path_factory) -> Callable[[str], Path]:
    """A random one-label model of a shape in a folder, with the tiny models' tokenizer."""

    def make(shape: str) -> Path:
        folder = tmp_path_factory.mktemp(shape)
        tiny = make_tiny("reward")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny / name).read_bytes())
        shared = {"vocab_size": 50, "num_labels": 1, "pad_token_id": PAD, "eos_token_id": PAD, "bos_token_id": 0}
        torch.manual_seed(5)
        config = SHAPES[shape](**shared, initializer_range=0.2)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return folder

    return make


def padded_forward(folder: Path, batch: list[list[int]], side: str, dtype: torch.dtype) -> np.ndarray:
    """transformers' own logits of a batch, padded on one side."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    longest = max(map(len, batch))
    padding = [[PAD] * (longest - len(ids)) for ids in batch]
    rows = [pad + ids if side == "left" else ids + pad for ids, pad in zip(batch, padding, strict=True)]
    input_ids = torch.tensor(rows)
    mask = (input_ids != PAD).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, 0].float().numpy()


@pytest.mark.parametrize("shape", SHAPES)
async def test_scores_equal_transformers_padded_on_either_side_in_any_company(make_shape, shape):
    folder, batch = make_shape(shape), sequences(7)
    async with serving(folder) as peer:
        together = await peer.score(batch)
        alone = np.concatenate([await peer.score([ids]) for ids in batch])
        neighbours = await asyncio.gather(
            *(peer.score([ids, other]) for ids, other in zip(batch, batch[1:] + batch[:1], strict=True))
        )
    for side in ("left", "right"):
        own = padded_forward(folder, batch, side, torch.float32)
        assert np.ptp(own) > 0.05, "the model tells these sequences apart"
        for found in (together, alone, np.array([pair[0] for pair in neighbours])):
            np.testing.assert_allclose(found, own, atol=1e-5, rtol=0, err_msg=f"{shape}, padded {side}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_deterministic_requests_are_bitwise_the_same_in_any_company(make_shape, shape, dtype):
    batch = sequences(5)
    async with serving(make_shape(shape), dtype=dtype) as peer:
        together = await peer.score(batch, deterministic=True)
        beside, alone = [], []
        for ids in batch:  # each beside calls that are not deterministic
            mine, *_ = await asyncio.gather(peer.score([ids], deterministic=True), *(peer.score([o]) for o in batch))
            beside.append(mine)
            alone.append(await peer.score([ids], deterministic=True))
    assert together.tobytes() == np.concatenate(beside).tobytes() == np.concatenate(alone).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
async def test_bfloat16_scores_are_as_near_to_float32_as_transformers_own(make_shape, shape):
    """Within twice the distance that transformers' own bfloat16 forward has, or 0.02 of the scores' spread."""
    folder, batch = make_shape(shape), sequences(24)
    async with serving(folder, dtype="bfloat16") as peer:
        found = await peer.score(batch)
    exact = padded_forward(folder, batch, "left", torch.float32)
    own = padded_forward(folder, batch, "left", torch.bfloat16)
    distance, allowed = np.abs(found - exact).max(), 2 * np.abs(own - exact).max() + 0.02 * np.ptp(exact)
    assert distance <= allowed, (distance, allowed)


async def test_the_real_model_scores_as_transformers_does(tmp_path):
    model = ScalarModel.from_policy(Policy.load(str(REAL)), seed=0)
    model.model.config.pad_token_id = PAD
    model.save(tmp_path)
    batch = sequences(9, vocabulary=model.vocab_size)
    async with serving(tmp_path) as peer:
        found = await peer.score(batch)
    for side in ("left", "right"):
        own = padded_forward(tmp_path, batch, side, torch.float32)
        np.testing.assert_allclose(found, own, atol=1e-5, rtol=0)

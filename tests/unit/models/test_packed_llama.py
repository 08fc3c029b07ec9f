"""The Llama family's own body gives the last hidden states of transformers' forward, for each of its formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from trimtab.models import attention, cpu
from trimtab.models.packed_llama import PackedLlama
from trimtab.models.packing import pack
from trimtab.models.policy import body_forward

WIDTHS: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_labels": 1,
    "pad_token_id": 1,
}
FAMILY = {
    "llama": lambda: LlamaConfig(**WIDTHS, attention_bias=True, mlp_bias=True),
    "linear rope": lambda: LlamaConfig(
        **WIDTHS, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral": lambda: MistralConfig(**WIDTHS, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**WIDTHS),
    "qwen3": lambda: Qwen3Config(**WIDTHS),
}


def build(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model whose norms and biases are not the ones and zeros of a fresh one."""
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention.NAME)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


def sequences(lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(6)
    return [rng.integers(2, 60, length, dtype=np.int32) for length in lengths]


@pytest.fixture(params=[(), ("GenuineIntel",), ("AuthenticAMD", "avx512_bf16"), ("GenuineIntel", "amx_bf16")])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of this code on machines of other kinds."""
    monkeypatch.setattr(cpu, "_words", lambda: frozenset(request.param))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("lengths", [(1,), (37,), (5, 90, 2, 88, 300, 1, 90)])
@pytest.mark.parametrize("name", FAMILY)
def test_last_hidden_states_are_those_of_transformers(name: str, lengths: tuple[int, ...]) -> None:
    model = build(FAMILY[name]())
    body = PackedLlama.of(model)
    assert body is not None
    packed = pack(sequences(lengths))
    with torch.inference_mode():
        expected_BD = body_forward(model, packed, packed.last_tokens_B)
    torch.testing.assert_close(body.last_hidden(packed), expected_BD, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("machine")
def test_in_bfloat16_they_differ_by_rounding() -> None:
    model = build(FAMILY["qwen3"](), torch.bfloat16)
    body = PackedLlama.of(model)
    assert body is not None
    packed = pack(sequences((30, 60, 4)))
    with torch.inference_mode():
        expected_BD = body_forward(model, packed, packed.last_tokens_B)
    got_BD = body.last_hidden(packed)
    assert got_BD.dtype == torch.bfloat16
    assert (got_BD - expected_BD).float().norm() < 0.03 * expected_BD.float().norm()


def test_another_formula_is_found_out() -> None:
    model = build(FAMILY["llama"]())
    body = PackedLlama(model)
    body.check()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.gate_proj.weight").mul_(1.1)
    with pytest.raises(ValueError, match="differ by"):
        body.check()


def test_other_families_are_left_to_transformers() -> None:
    config = GemmaConfig(**WIDTHS)
    assert PackedLlama.of(build(config)) is None

"""Before it serves, the engine compares itself with full forwards and refuses what it would get wrong."""

from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from trimtab.generator.local import attention, selfcheck
from trimtab.generator.local.llama import LlamaRunner
from trimtab.models import cpu


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "opt", "bloom"])
def test_architectures_that_are_served_pass(lab: ModuleType, architecture: str) -> None:
    model = lab.build(architecture)
    default = model.config._attn_implementation
    selfcheck.prepare(model)
    assert model.config._attn_implementation == (attention.NAME if default == "sdpa" else default)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [(), ("GenuineIntel",), ("GenuineIntel", "amx_bf16")])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_the_llama_runner_is_right_in_the_way_of_every_machine(
    words: tuple[str, ...], dtype: torch.dtype, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_words", lambda: frozenset(words))
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    runner = LlamaRunner(model, max_rows=8)
    selfcheck.compare(model, runner)
    fused = runner._attention._fuses
    assert fused == (dtype is torch.bfloat16 and "amx_bf16" in words)


def test_an_attention_that_drops_the_mask_is_replaced_by_one_that_is_right(lab: ModuleType) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def maskless(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
        return sdpa_attention_forward(module, query, key, value, None, **options)

    AttentionInterface.register("trimtab_test_maskless", maskless)
    model = lab.build("gpt2")
    model.set_attn_implementation("trimtab_test_maskless")
    with pytest.raises(ValueError, match="differ"):
        selfcheck.check(model)
    selfcheck.prepare(model)
    assert model.config._attn_implementation == "eager"


def test_recurrent_models_are_refused_in_words(lab: ModuleType) -> None:
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    with pytest.raises(ValueError, match="recurrent"):
        selfcheck.prepare(Mamba2ForCausalLM(config))

"""The gated MLP that keeps half, against transformers' own, forward and backward."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralConfig, MistralMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP

from trimtab.models.gated import GatedDown, shorten

SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2}
MLPS = {LlamaMLP: LlamaConfig, Qwen3MLP: Qwen3Config, MistralMLP: MistralConfig}


def build(mlp_class, config, dtype=torch.float32):
    torch.manual_seed(0)
    return mlp_class(config).to(dtype)


def run(module, x, upstream):
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    return out.detach(), *torch.autograd.grad(out, (leaf, *module.parameters()), upstream)


def kept_numbers(module, x):
    """How many numbers a forward keeps for its backward, weights and input aside."""
    own = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        module(x)
    return sum(tensor.numel() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize("mlp_class", MLPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_bitwise_those_of_transformers(mlp_class, dtype):
    module = build(mlp_class, MLPS[mlp_class](**SIZES), dtype)
    x, upstream = (torch.randn(1, 7, 32, dtype=dtype) for _ in range(2))
    expected = run(module, x, upstream)
    shorten(module)
    assert module.forward.__func__.__module__ == "trimtab.models.gated"
    assert all(map(torch.equal, run(module, x, upstream), expected))
    with torch.no_grad():
        assert torch.equal(module(x), expected[0])


def test_half_is_kept():
    module = build(LlamaMLP, LlamaConfig(**SIZES))
    x = torch.randn(1, 7, 32, requires_grad=True)
    before = kept_numbers(module, x)
    shorten(module)
    assert (before, kept_numbers(module, x)) == (4 * 7 * 40, 2 * 7 * 40)


def test_gradients_are_the_derivative():
    gate, up, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (4, 5))
    )
    assert torch.autograd.gradcheck(GatedDown.apply, (gate, up, weight))


@pytest.mark.parametrize(
    ("mlp_class", "config"),
    [
        (Gemma2MLP, Gemma2Config(**SIZES)),  # GELU
        (LlamaMLP, LlamaConfig(**SIZES, hidden_act="gelu")),
        (LlamaMLP, LlamaConfig(**SIZES, mlp_bias=True)),
    ],
)
def test_an_mlp_of_another_formula_goes_its_own_way(mlp_class, config):
    module = build(mlp_class, config)
    x, upstream = torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    expected = run(module, x, upstream)
    shorten(module)
    assert all(map(torch.equal, run(module, x, upstream), expected))


def test_adapters_are_not_passed_over():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=11, num_hidden_layers=1)
    model = LlamaForCausalLM(config)
    shorten(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    tokens = torch.arange(11)[None]
    out = adapted(tokens).logits
    with adapted.disable_adapter():
        assert not torch.allclose(out, adapted(tokens).logits)
    out.sum().backward()
    adapters = [parameter for name, parameter in adapted.named_parameters() if "lora" in name]
    assert adapters and all(bool(parameter.grad.any()) for parameter in adapters)

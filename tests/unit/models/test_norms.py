"""The short RMSNorm against transformers' own, forward and backward."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from trimtab.models.norms import RMSNormFunction, shorten


def build(norm_class, dtype):
    torch.manual_seed(0)
    module = norm_class(48)
    with torch.no_grad():
        module.weight.normal_()
    return module.to(dtype)


def run(module, x, upstream):
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    return out.detach(), *torch.autograd.grad(out, (leaf, module.weight), upstream)


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_output_and_gradients_are_those_of_transformers(norm_class, dtype, tolerance):
    module = build(norm_class, dtype)
    x, upstream = (3 * torch.randn(2, 5, 7, 48, dtype=dtype) for _ in range(2))
    expected = run(module, x, upstream)
    shorten(module)
    assert module.forward.func.__module__ == "trimtab.models.norms"
    for ours, theirs in zip(run(module, x, upstream), expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def test_output_in_bfloat16_is_bitwise_that_of_transformers():
    module = build(LlamaRMSNorm, torch.bfloat16)
    x = torch.randn(9, 48, dtype=torch.bfloat16)
    expected = module(x)
    shorten(module)
    assert torch.equal(module(x), expected)


def test_gradients_are_the_derivative():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *leaves: RMSNormFunction.apply(*leaves, 1e-6), (x, weight))


def test_a_norm_of_another_formula_is_left_alone():
    module = build(Gemma2RMSNorm, torch.float32)
    x = torch.randn(4, 48)
    expected = module(x)
    shorten(module)
    assert torch.equal(module(x), expected) and "forward" not in vars(module)

"""The short rotary embedding against transformers' own, forward and backward, and where it must not be used."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trimtab.models.rotary import apply_rotary, shorten

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def inputs(dtype):
    torch.manual_seed(0)
    q = torch.randn(2, 5, 4, 8, dtype=dtype).transpose(1, 2)  # as a projection leaves it
    k = torch.randn(2, 5, 2, 8, dtype=dtype).transpose(1, 2)
    half = torch.rand(2, 5, 4)
    angle = torch.cat((half, half), -1)
    return q.requires_grad_(), k.requires_grad_(), angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_turned_queries_and_keys_and_their_gradients_are_those_of_transformers(dtype, tolerance):
    q, k, cos, sin = inputs(dtype)
    results = []
    for function in (apply_rotary, apply_rotary_pos_emb):
        turned = function(q, k, cos, sin)
        results.append((*turned, *torch.autograd.grad([t.square().sum() for t in turned], (q, k))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert float((ours - theirs).detach().norm()) <= tolerance * float(theirs.detach().norm())


def test_gradients_are_the_derivative():
    q, _, cos, sin = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, x, cos, sin)[0], (q,))


def test_narrower_angles_turn_the_first_places_only():
    q, k, cos, sin = inputs(torch.float64)
    wide_q, wide_k = (torch.cat((x, x[..., :3]), -1) for x in (q, k))
    for wide, turned, narrow in zip((wide_q, wide_k), apply_rotary(wide_q, wide_k, cos, sin), (q, k), strict=True):
        assert torch.equal(turned, torch.cat((apply_rotary(narrow, narrow, cos, sin)[0], wide[..., -3:]), -1))


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL, **HEADS), Qwen3Config(**SMALL, **HEADS, head_dim=8)])
def test_a_model_calls_it_and_gives_the_same_logits(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    expected = model(ids).logits
    shorten(model)
    attention = model.base_model.layers[0].self_attn
    assert attention.forward.__func__.__globals__["apply_rotary_pos_emb"] is apply_rotary
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_model_without_rotary_positions_is_left_alone():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4))
    shorten(model)
    assert not any("forward" in vars(module) for module in model.modules())

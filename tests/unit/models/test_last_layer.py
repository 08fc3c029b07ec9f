"""Hidden states of chosen tokens against those of all of them, with the last layer shortened and without."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from trimtab.models.attention import NAME
from trimtab.models.last_layer import is_short, shorten
from trimtab.models.packing import pack
from trimtab.models.policy import body_forward

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHORT = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "qwen3": Qwen3Config(**SMALL, **HEADS, head_dim=8),
    "mistral": MistralConfig(**SMALL, **HEADS, sliding_window=5),
}
OTHERS = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
}
PACKED = pack([np.arange(start, start + length, dtype=np.int32) for start, length in ((3, 7), (20, 1), (30, 19))])
WANTED_R = torch.tensor([4, 0, 7, 26, 26, 13])


def build(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=torch.float64).eval()


def gradients(model, hidden):
    model.zero_grad()
    (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", [*SHORT, *OTHERS])
def test_chosen_hidden_states_and_their_gradients_are_those_of_a_whole_forward(name):
    model = build({**SHORT, **OTHERS}[name])
    expected = body_forward(model, PACKED).index_select(0, WANTED_R)
    wanted = gradients(model, expected)
    shorten(model)
    assert is_short(model) == (name in SHORT)
    hidden = body_forward(model, PACKED, WANTED_R)
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(model, hidden), wanted, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_nothing():
    model = build(SHORT["llama"])
    shorten(model)
    wanted = gradients(model, body_forward(model, PACKED, WANTED_R))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ours = gradients(model, body_forward(model, PACKED, WANTED_R))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, wanted, strict=True) if a is not None)


def test_a_shortened_model_still_gives_every_token():
    model = build(SHORT["llama"])
    expected = body_forward(model, PACKED)
    shorten(model)
    assert torch.equal(body_forward(model, PACKED), expected)


def test_what_stands_behind_the_attention_runs_for_the_wanted_tokens_alone():
    model = build(SHORT["llama"])
    shorten(model)
    seen = []
    model.base_model.layers[-1].mlp.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].shape))
    body_forward(model, PACKED, WANTED_R)
    assert seen == [(1, len(WANTED_R), 32)]


def test_a_layer_with_another_forward_is_left_alone():
    class Scaled(LlamaDecoderLayer):
        def forward(self, hidden_states, **kwargs):
            return 0.5 * super().forward(hidden_states, **kwargs)

    model = build(SHORT["llama"])
    layers = model.base_model.layers
    layers[-1].__class__ = Scaled
    shorten(model)
    assert not is_short(model)

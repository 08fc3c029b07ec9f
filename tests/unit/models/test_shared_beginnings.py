"""Sequences behind one copy of what they begin with, against forwards of each of them alone."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from trimtab.models import norms, packing
from trimtab.models.attention import NAME
from trimtab.models.errors import ModelLoadError
from trimtab.models.layouts import check_packing, shares_beginnings
from trimtab.models.packing import pack, pack_sets, shared_beginning
from trimtab.models.policy import body_forward

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "qwen3": Qwen3Config(**SMALL, **HEADS, head_dim=8),
    "mistral": MistralConfig(**SMALL, **HEADS, sliding_window=5),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
}
OTHERS = {
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, initializer_range=0.5),
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5),
}


def build(config, attention, dtype=torch.float32):
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # from_config writes the attention into it, for every model that shares it
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    norms.shorten(model)
    return model


def tokens(random, count):
    return random.integers(3, 61, count).astype(np.int32)


def ragged_sets():
    """Prompts of 9, 7 and 0 tokens with responses of very different lengths, one of them nothing but its prompt."""
    random = np.random.default_rng(0)
    first, second = tokens(random, 9), tokens(random, 7)
    return [
        [np.concatenate([first, tokens(random, count)]) for count in (12, 3, 11, 1, 0)],
        [np.concatenate([second, tokens(random, count)]) for count in (10, 10)],
        [np.array([3, 5], dtype=np.int32), np.array([4, 5, 6], dtype=np.int32)],
    ]


def even_sets():
    """Every prompt 6 and every response 8 tokens: the layout that needs no gathering of queries."""
    random = np.random.default_rng(1)
    return [[np.concatenate([prompt, tokens(random, 8)]) for _ in range(3)] for prompt in tokens(random, (2, 6))]


@pytest.mark.parametrize("padded_places", [packing.PADDED_PLACES["cpu"], 100], ids=["few groups", "many"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["32", "64"])
@pytest.mark.parametrize("sets", [ragged_sets(), even_sets()], ids=["ragged", "even"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_gradients_equal_forwards_of_each_alone(name, sets, dtype, tolerance, padded_places, monkeypatch):
    monkeypatch.setattr(packing, "PADDED_PLACES", {"cpu": padded_places})
    if name == "gemma2":  # its norms round to float32 in every dtype
        tolerance = max(tolerance, 1e-6)
    ours, alone = build(CONFIGS[name], NAME, dtype), build(CONFIGS[name], NAME, dtype)
    packed = pack_sets(sets)
    got_BD = body_forward(ours, packed)[packed.last_tokens_B]
    want_BD = torch.stack([body_forward(alone, pack([member]))[-1] for members in sets for member in members])
    torch.testing.assert_close(got_BD, want_BD, rtol=tolerance, atol=tolerance)
    head_D = torch.linspace(-1, 1, 32, dtype=dtype)
    (got_BD @ head_D).square().sum().backward()
    (want_BD @ head_D).square().sum().backward()
    for (key, got), want in zip(ours.named_parameters(), alone.parameters(), strict=True):
        if want.grad is not None:
            gap = float((got.grad - want.grad).norm() / want.grad.norm().clamp_min(1e-6))
            assert gap <= tolerance, f"{key}: {gap}"


@pytest.mark.parametrize("name", CONFIGS)
def test_last_states_equal_transformers_own_forwards(name):
    sets = ragged_sets()
    ours, theirs, packed = build(CONFIGS[name], NAME), build(CONFIGS[name], "eager"), pack_sets(sets)
    alone = [torch.tensor(member[None].astype(np.int64)) for members in sets for member in members]
    with torch.no_grad():
        got_BD = body_forward(ours, packed)[packed.last_tokens_B]
        want_BD = torch.stack([theirs.base_model(ids).last_hidden_state[0, -1] for ids in alone])
    torch.testing.assert_close(got_BD, want_BD, rtol=1e-5, atol=1e-5)


def test_what_a_set_begins_with_stands_in_the_row_once():
    sets = ragged_sets()
    packed = pack_sets(sets)
    assert packed.token_ids_N.numel() == 9 + 12 + 3 + 11 + 1 + 7 + 10 + 10 + 2 + 3
    ends = [int(member[-1]) for members in sets for member in members]
    assert packed.token_ids_N[packed.last_tokens_B].tolist() == ends
    assert packed.position_ids_N[packed.last_tokens_B].tolist() == [
        len(member) - 1 for members in sets for member in members
    ]


def test_the_shared_beginning_ends_where_two_first_differ():
    rows = [np.array(row) for row in ([1, 2, 3, 4], [1, 2, 5, 4], [1, 2, 3])]
    assert shared_beginning(rows) == 2
    assert shared_beginning(rows[:1]) == 4
    assert shared_beginning([rows[0], rows[2]]) == 3


def test_a_poisoned_response_changes_no_other():
    model = build(CONFIGS["llama"], NAME)
    weight = model.model.embed_tokens.weight
    weight.data = torch.cat([weight.data, torch.full((1, 32), torch.nan)])
    sets = even_sets()
    sets[0][1][6:] = 61
    packed = pack_sets(sets)
    with torch.no_grad():
        finite = body_forward(model, packed)[packed.last_tokens_B].isfinite().all(1)
    assert finite.tolist() == [True, False, True, True, True, True]


def test_long_sequences_take_another_route_to_the_same_numbers():
    """Beyond `attention.SHORT_ON_CPU` torch's own attention computes."""
    model, random = build(CONFIGS["llama"], NAME, torch.float64), np.random.default_rng(2)
    prompt = tokens(random, 250)
    members = [np.concatenate([prompt, tokens(random, count)]) for count in (40, 38)]
    with torch.no_grad():
        packed, plain = pack_sets([members]), pack(members)
        got, want = (body_forward(model, batch)[batch.last_tokens_B] for batch in (packed, plain))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_attention_and_position_ids_allow_both_layouts(name):
    model = build(CONFIGS[name], NAME)
    check_packing(model, body_forward, name)
    assert shares_beginnings(model, body_forward)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_mix_packed_sequences_are_refused(name):
    model = build(OTHERS[name], NAME)
    assert not shares_beginnings(model, body_forward)
    with pytest.raises(ModelLoadError, match="mixes sequences"):
        check_packing(model, body_forward, name)


def test_an_empty_set_or_sequence_is_refused():
    for sets in ([], [[]], [[np.zeros(0, dtype=np.int32)]]):
        with pytest.raises(ValueError, match="at least one"):
            pack_sets(sets)

"""The packed forward against transformers' own forward, one sequence at a time."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from trimtab.models import cpu, packing, policy
from trimtab.models.attention import NAME
from trimtab.models.packing import pack, plan_batches, response_positions
from trimtab.models.policy import body_forward
from trimtab.models.scalar_head import ScalarModel

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "qwen3": Qwen3Config(**SMALL, **HEADS, head_dim=8),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4),
    "gemma2": Gemma2Config(**SMALL, **HEADS, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**SMALL, **HEADS, sliding_window=5),
}
LENGTHS = (7, 1, 19, 7, 18, 3, 12)


def build(name, attention):
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # from_config writes the attention into it, for every model that shares it
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def sequences():
    random = np.random.default_rng(0)
    return [random.integers(0, 61, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(
    params=["products", "fused", "products, rounded", "fused, rounded", "products, groups", "fused, groups"]
)
def machine(request, monkeypatch):
    """The ways of this code on machines of other kinds, and with as many groups as long sequences have."""
    if "groups" in request.param:
        monkeypatch.setattr(packing, "PADDED_PLACES", {"cpu": 100})
    words = {"GenuineIntel"} if "fused" in request.param else set()
    monkeypatch.setattr(cpu, "_words", lambda: frozenset(words))
    for module in (policy, packing):
        monkeypatch.setattr(module, "compiles_by_shape", lambda dtype: "rounded" in request.param)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_hidden_states_equal_separate_runs(name, sequences):
    ours, theirs = build(name, NAME), build(name, "eager")
    with torch.no_grad():
        packed = body_forward(ours, pack(sequences))
        alone = [theirs.base_model(torch.tensor(s[None].astype(np.int64))).last_hidden_state[0] for s in sequences]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_gradients_equal_separate_runs(name, sequences):
    ours, theirs = build(name, NAME), build(name, "eager")
    body_forward(ours, pack(sequences)).square().sum().backward()
    for s in sequences:
        theirs.base_model(torch.tensor(s[None].astype(np.int64))).last_hidden_state.square().sum().backward()
    for (key, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("victim", range(len(LENGTHS)))
def test_a_poisoned_sequence_changes_no_other(victim, sequences):
    model = build("llama", NAME)
    packed = pack(sequences)
    with torch.no_grad():
        clean = body_forward(model, packed).split(packed.lengths)
        model.model.embed_tokens.weight.data = torch.cat(
            [model.model.embed_tokens.weight, torch.full((1, 32), torch.nan)]
        )
        poisoned_sequences = [s if i != victim else np.full_like(s, 61) for i, s in enumerate(sequences)]
        poisoned = body_forward(model, pack(poisoned_sequences)).split(packed.lengths)
    for index, (before, after) in enumerate(zip(clean, poisoned, strict=True)):
        assert torch.equal(before, after) == (index != victim)


def test_a_poisoned_sequence_sends_no_gradient_to_others(sequences):
    model = build("llama", NAME)
    weight = model.model.embed_tokens.weight
    weight.data = torch.cat([weight.data, torch.full((1, 32), torch.nan)])
    packed = pack([np.full_like(s, 61) if i == 0 else s for i, s in enumerate(sequences)])
    embedded = model.model.embed_tokens(packed.token_ids_N[None]).detach().requires_grad_()
    out = model.model(inputs_embeds=embedded, position_ids=packed.position_ids_N[None], use_cache=False, packed=packed)
    sum(h.sum() for h in out.last_hidden_state[0].split(packed.lengths)[1:]).backward()
    assert embedded.grad[0, LENGTHS[0] :].isfinite().all()


def test_position_ids_restart_for_each_sequence(sequences):
    expected = np.concatenate([np.arange(length) for length in LENGTHS])
    assert np.array_equal(pack(sequences).position_ids_N.numpy(), expected)


def test_an_attention_mask_is_refused_not_dropped(sequences):
    model, packed = build("llama", NAME), pack(sequences)
    with pytest.raises(ValueError, match="packed"):
        model.base_model(input_ids=packed.token_ids_N[None], use_cache=False)


def test_a_group_pads_by_no_more_places_than_a_group_of_its_own_is_worth(monkeypatch):
    monkeypatch.setattr(packing, "compiles_by_shape", lambda dtype: False)
    lengths = np.random.default_rng(0).integers(1, 300, 60)
    packed = pack([np.zeros(length, dtype=np.int32) for length in lengths])
    parts = packed.queries_M.split([group.count * group.length for group in packed.groups])
    found = []
    for group, part in zip(packed.groups, parts, strict=True):
        own = [len(row.unique()) for row in part.view(group.count, group.length)]
        assert max(own) == group.length
        assert sum(group.length**2 - length**2 for length in own) <= packing.PADDED_PLACES["cpu"]
        found += own
    assert sorted(found) == sorted(lengths) and 5 < len(packed.groups) < 40
    assert torch.equal(packed.queries_M[packed.places_N], torch.arange(lengths.sum()))


def test_sequences_of_one_length_are_read_where_they_stand():
    packed = pack([np.zeros(32, dtype=np.int32)] * 5)
    assert packed.keys_M is None and packed.queries_M is None and len(packed.groups) == 1


def test_plan_batches_keeps_the_budget_and_every_sequence():
    lengths = [5, 100, 7, 7, 3, 60, 41]
    plan = plan_batches(lengths, 64)
    assert sorted(i for batch in plan for i in batch) == list(range(7))
    assert all(sum(lengths[i] for i in batch) <= 64 or len(batch) == 1 for batch in plan)
    assert plan_batches([], 64) == []


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "expected"),
    [
        ([96] * 16, 512, [4, 4, 4, 4]),  # filled one after the other: 5, 5, 5, 1
        ([96] * 16, 1536, [16]),
        ([3] * 10, 10, [3, 3, 3, 1]),
        ([50, 20, 20, 20, 10, 5], 60, [1, 2, 3]),  # filled one after the other: 50, 60 and 15 tokens
        ([40, 30, 20, 10], 75, [1, 3]),
    ],
)
def test_micro_batches_are_few_and_about_as_full_as_one_another(lengths, max_tokens, expected):
    assert [len(batch) for batch in plan_batches(lengths, max_tokens)] == expected


def test_response_positions_stand_before_each_response_token():
    assert response_positions([4, 3], [2, 1]).tolist() == [1, 2, 4, 5]


def test_sequence_classification_scores_equal_transformers_with_padding(sequences):

    def config() -> LlamaConfig:
        return LlamaConfig(**SMALL, **HEADS, num_labels=1, pad_token_id=0)

    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_config(config(), attn_implementation="eager").eval()
    ours = ScalarModel.__new__(ScalarModel)
    torch.manual_seed(0)
    ours.model = AutoModelForSequenceClassification.from_config(config(), attn_implementation=NAME).eval()
    clean = [np.maximum(s, 1) for s in sequences]  # 0 is the padding of the other side
    width = max(LENGTHS)
    padded = torch.tensor(np.stack([np.pad(s, (0, width - len(s))) for s in clean]).astype(np.int64))
    with torch.no_grad():
        want = theirs(padded, attention_mask=(padded != 0).long()).logits[:, 0]
        got = ours.last_token_scores(pack(clean))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

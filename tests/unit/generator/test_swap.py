"""Weight swaps between two decode steps: which version samples which token, and that nothing is lost."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from trimtab.generator.engine import (
    FinishedSequence,
    StagedPatches,
    StagedWeights,
    SwapMode,
    TokenRun,
    WeightPatch,
)
from trimtab.generator.local import scheduler
from trimtab_client.versions import ModelVersion


def staged(lab: ModuleType, model: torch.nn.Module) -> StagedWeights:
    return StagedWeights(lab.V2, model.state_dict())


def steps(engine, count: int) -> list:
    return [outcome for _ in range(count) for outcome in engine.step()]


def drain(engine) -> dict[int, FinishedSequence]:
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    return {outcome.sequence_id: outcome for outcome in outcomes}


# The first is decoded by the Llama family's runner, the second by transformers.
RUNNERS = ["llama", "gpt2"]


@pytest.mark.parametrize("architecture", RUNNERS)
def test_drain_ends_what_runs_on_the_old_version_and_starts_the_rest_on_the_new(
    lab: ModuleType, architecture: str
) -> None:
    old, new = lab.build(architecture, seed=0), lab.build(architecture, seed=1)
    engine = lab.engine_of(lab.build(architecture, seed=0), max_slots=2)
    requests = [lab.request(i, prompt, seed=i, max_tokens=10) for i, prompt in enumerate(lab.random_prompts(5))]
    engine.submit(requests)
    steps(engine, 3)
    swap = engine.swap(staged(lab, new), SwapMode.DRAIN)
    steps(engine, 2)
    assert not swap.done() and engine.version == lab.V1
    finished = drain(engine)
    assert swap.result() == lab.V2 == engine.version
    for asked in requests:
        model, version = (old, lab.V1) if asked.sequence_id < 2 else (new, lab.V2)
        got = finished[asked.sequence_id]
        assert got.runs == (TokenRun(version, 10),)
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("architecture", RUNNERS)
@pytest.mark.parametrize("mode", [SwapMode.KEEP, SwapMode.RECOMPUTE_KV])
def test_sequences_in_flight_go_on_and_say_which_version_sampled_what(
    lab: ModuleType, mode: SwapMode, architecture: str, deterministic: bool
) -> None:
    old, new = lab.build(architecture, seed=0), lab.build(architecture, seed=1)
    live = lab.build(architecture, seed=0)
    engine = lab.engine_of(live, max_slots=3, prefill_tokens=16, deterministic=deterministic)
    requests = [lab.request(i, prompt, seed=i, max_tokens=12) for i, prompt in enumerate(lab.random_prompts(5))]
    engine.submit(requests)
    early = [outcome.sequence_id for outcome in steps(engine, 8)]
    counts = {slot.request.sequence_id: int(engine._table.counts[row]) for row, slot in enumerate(engine._table.slots)}
    swap = engine.swap(staged(lab, new), mode)
    engine.step()
    assert swap.result() == lab.V2 and counts and not early
    finished = drain(engine)
    for asked in requests:
        got, first = finished[asked.sequence_id], counts.get(asked.sequence_id, 0)
        assert got.runs == tuple(TokenRun(*run) for run in ((lab.V1, first), (lab.V2, 12 - first)) if run[1])
        before = lab.full_logprobs(old, asked.prompt_ids, got.token_ids, 1.0)
        after = lab.full_logprobs(new, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs[:first], before[:first], atol=1e-4)
        if mode is SwapMode.RECOMPUTE_KV or first == 0:
            np.testing.assert_allclose(got.logprobs[first:], after[first:], atol=1e-4)
        else:
            kept = continued_logprobs(old, new, asked.prompt_ids, got.token_ids, first)
            np.testing.assert_allclose(got.logprobs[first:], kept, atol=1e-4)
            assert np.abs(kept - after[first:]).max() > 1e-2  # what the old keys and values make of it


@torch.inference_mode()
def continued_logprobs(
    old: PreTrainedModel, new: PreTrainedModel, prompt: np.ndarray, response: np.ndarray, first: int
) -> np.ndarray:
    """The oracle of keep: `old` fills transformers' own cache until it has sampled `first` tokens, `new` goes on."""
    ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    known = len(prompt) + first - 1  # the newest token is fed by the new version
    past = old(input_ids=ids[:, :known], use_cache=True).past_key_values
    logits = new(input_ids=ids[:, known:-1], past_key_values=past).logits[0].float()
    return torch.log_softmax(logits, dim=-1).gather(1, ids[0, known + 1 :, None])[:, 0].numpy()


@pytest.mark.parametrize("mode", list(SwapMode))
def test_a_pinned_sequence_holds_the_swap_back_until_it_ends(lab: ModuleType, mode: SwapMode) -> None:
    engine = lab.engine_of(lab.build("llama"), max_slots=2)

    def only_old(version: ModelVersion) -> bool:
        return version == lab.V1

    pinned = [replace(lab.request(i, range(4), max_tokens=6), accepts=only_old) for i in (0, 1, 2)]
    engine.submit([*pinned, lab.request(9, range(4), max_tokens=3)])
    engine.step()
    swap = engine.swap(staged(lab, lab.build("llama", seed=1)), mode)
    finished = drain(engine)
    assert swap.result() == lab.V2
    assert all(finished[i].runs == (TokenRun(lab.V1, 6),) for i in (0, 1, 2))
    assert sum(run.token_count for run in finished[9].runs) == 3
    late = replace(lab.request(10, range(4)), accepts=only_old)
    engine.submit([late])
    assert [outcome.reason for outcome in engine.step()] == ["version"]


def test_weights_that_do_not_fit_are_refused_and_change_nothing(lab: ModuleType) -> None:
    engine = lab.engine_of(lab.build("llama"))
    weights = dict(lab.build("llama", seed=1).state_dict())
    lacking = {name: tensor for name, tensor in weights.items() if "norm" not in name}
    misshapen = {**weights, "model.norm.weight": torch.zeros(3)}
    for tensors, word in ((lacking, "lacks"), (misshapen, "shape"), ({**weights, "x": torch.zeros(1)}, "lacks")):
        with pytest.raises(ValueError, match=word):
            engine.swap(StagedWeights(lab.V2, tensors), SwapMode.KEEP).result(timeout=0)
    assert not engine.has_work and engine.version == lab.V1


def test_a_later_swap_replaces_one_that_waits_and_a_cancelled_one_never_comes(lab: ModuleType) -> None:
    engine = lab.engine_of(lab.build("llama"))
    engine.submit([lab.request(0, range(4), max_tokens=8)])
    engine.step()
    third = replace(lab.V2, step=3)
    first = engine.swap(staged(lab, lab.build("llama", seed=1)), SwapMode.DRAIN)
    second = engine.swap(StagedWeights(third, lab.build("llama", seed=2).state_dict()), SwapMode.DRAIN)
    with pytest.raises(ValueError, match="replaced"):
        first.result(timeout=0)
    drain(engine)
    assert second.result() == engine.version == third
    cancelled = engine.swap(staged(lab, lab.build("llama", seed=1)), SwapMode.DRAIN)
    cancelled.cancel()
    drain(engine)
    assert engine.version == third


def test_bfloat16_models_take_float32_versions(lab: ModuleType) -> None:
    live = lab.build("llama", seed=0, scale=1.0).to(torch.bfloat16)
    new = lab.build("llama", seed=1, scale=1.0)
    engine = lab.engine_of(live)
    swap = engine.swap(staged(lab, new), SwapMode.DRAIN)
    engine.step()
    assert swap.result() == lab.V2
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, new.state_dict()[name].to(torch.bfloat16)), name


def patch(name: str, positions: list[int], value: float) -> WeightPatch:
    return WeightPatch(name, torch.tensor(positions), torch.full((len(positions),), value))


def test_patches_change_their_elements_and_nothing_else(lab: ModuleType) -> None:
    live = lab.build("llama")
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    engine = lab.engine_of(live)
    head = "model.embed_tokens.weight"
    patches = [patch(head, [0, 7], 0.5), patch("model.norm.weight", [3], 2.0), patch(head, [7], 0.25)]
    swap = engine.swap(StagedPatches(lab.V2, lab.V1, patches), SwapMode.KEEP)
    engine.step()
    assert swap.result() == lab.V2 == engine.version
    before[head].view(-1)[[0, 7]] = torch.tensor([0.5, 0.25])
    before["model.norm.weight"][3] = 2.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())


@pytest.mark.parametrize("architecture", RUNNERS)
def test_patched_weights_are_those_that_sample_tied_ones_too(lab: ModuleType, architecture: str) -> None:
    live = lab.build(architecture)
    live.get_output_embeddings().weight = live.get_input_embeddings().weight
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight")
    if architecture == "gpt2":
        names = ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight")
    engine = lab.engine_of(live)
    asked = lab.request(0, range(9), seed=3, max_tokens=20)
    engine.submit([asked])
    steps(engine, 4)
    swap = engine.swap(StagedPatches(lab.V2, lab.V1, [patch(n, list(range(40)), 0.3) for n in names]), SwapMode.DRAIN)
    engine.submit([replace(asked, sequence_id=1)])
    finished = drain(engine)
    assert swap.result() == lab.V2 and [run.version for run in finished[1].runs] == [lab.V2]
    assert all((live.state_dict()[name].view(-1)[:40] == 0.3).all() for name in names)
    expected = lab.full_logprobs(live, asked.prompt_ids, finished[1].token_ids, 1.0)
    np.testing.assert_allclose(finished[1].logprobs, expected, atol=1e-4)
    assert not np.array_equal(finished[0].token_ids, finished[1].token_ids)


def test_a_large_version_is_made_ready_between_steps_while_the_old_one_samples(
    lab: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "ELEMENTS_A_STEP", 1)
    new = lab.build("llama", seed=1)
    engine = lab.engine_of(lab.build("llama", seed=0))
    asked = lab.request(0, range(5), max_tokens=12)
    engine.submit([asked])
    engine.step()
    swap = engine.swap(staged(lab, new), SwapMode.RECOMPUTE_KV)
    steps(engine, 3)  # two layers and the head
    assert not swap.done() and engine.version == lab.V1
    engine.step()
    assert swap.result() == lab.V2
    got = drain(engine)[0]
    assert got.runs == (TokenRun(lab.V1, 4), TokenRun(lab.V2, 8))
    after = lab.full_logprobs(new, asked.prompt_ids, got.token_ids, 1.0)
    np.testing.assert_allclose(got.logprobs[4:], after[4:], atol=1e-4)


@pytest.mark.parametrize("architecture", RUNNERS)
def test_sampling_waits_for_an_exchange_of_tensors_and_not_for_copies(lab: ModuleType, architecture: str) -> None:
    live, new = lab.build(architecture, seed=0), lab.build(architecture, seed=1)
    engine = lab.engine_of(live)
    engine.submit([lab.request(0, range(5), max_tokens=12)])
    engine.step()
    coming = staged(lab, new)
    addresses = {name: tensor.data_ptr() for name, tensor in coming.tensors.items()}
    swap = engine.swap(coming, SwapMode.KEEP)
    assert engine.pause_s == 0
    drain(engine)
    assert swap.result() == lab.V2 and engine.pause_s > 0
    served = live.state_dict()
    assert all(served[name].data_ptr() == address for name, address in addresses.items())


def test_a_version_that_cannot_be_made_ready_is_told_why_and_sampling_goes_on(lab: ModuleType, monkeypatch) -> None:
    old, new = lab.build("llama", seed=0), lab.build("llama", seed=1)
    engine = lab.engine_of(lab.build("llama", seed=0), max_slots=2)
    monkeypatch.setattr(scheduler, "ELEMENTS_A_STEP", 1)
    whole = engine._runner.prepare

    def runs_out_of_memory(weights: StagedWeights) -> Iterator[int]:
        yield next(whole(weights))
        raise RuntimeError("no memory is left")

    requests = [lab.request(i, prompt, seed=i, max_tokens=10) for i, prompt in enumerate(lab.random_prompts(3))]
    engine.submit(requests)
    steps(engine, 2)
    monkeypatch.setattr(engine._runner, "prepare", runs_out_of_memory)
    swap = engine.swap(staged(lab, new), SwapMode.KEEP)
    finished = drain(engine)
    with pytest.raises(RuntimeError, match="no memory is left"):
        swap.result(timeout=0)
    for asked in requests:
        got = finished[asked.sequence_id]
        assert got.runs == (TokenRun(lab.V1, 10),)
        expected = lab.full_logprobs(old, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
    monkeypatch.setattr(engine._runner, "prepare", whole)
    again = engine.swap(staged(lab, new), SwapMode.KEEP)
    drain(engine)
    assert again.result(timeout=0) == lab.V2 == engine.version


def test_patches_of_another_base_or_tensor_are_refused_and_change_nothing(lab: ModuleType) -> None:
    live = lab.build("llama")
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    engine = lab.engine_of(live)
    for bad in (patch("x", [0], 1.0), patch("model.norm.weight", [32], 1.0)):
        with pytest.raises(ValueError, match=bad.name):
            engine.swap(StagedPatches(lab.V2, lab.V1, [bad]), SwapMode.KEEP).result(timeout=0)
    good = [patch("model.norm.weight", [0], 9.0)]
    swap = engine.swap(StagedPatches(replace(lab.V2, step=3), lab.V2, good), SwapMode.KEEP)
    engine.step()
    with pytest.raises(ValueError, match="staged beside"):
        swap.result(timeout=0)
    assert engine.version == lab.V1
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())

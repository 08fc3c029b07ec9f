"""A prompt longer than a step's budget is computed in pieces, and what is being decoded goes on between them."""

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from trimtab.generator.engine import FinishedSequence, SequenceRequest, StagedWeights, SwapMode, TokenRun
from trimtab.generator.local.scheduler import LocalEngine


def long_samples(lab: ModuleType, count: int) -> list[SequenceRequest]:
    prompt = np.random.default_rng(2).integers(0, 256, 70, dtype=np.int32)
    return [replace(lab.request(50 + i, prompt, seed=i, max_tokens=9), prompt_key=7) for i in range(count)]


def rest(engine: LocalEngine) -> dict[int, FinishedSequence]:
    finished = {}
    while engine.has_work:
        finished |= {outcome.sequence_id: outcome for outcome in engine.step()}
    return finished


@pytest.mark.parametrize("deterministic", [False, True])
def test_mates_are_decoded_between_the_pieces_and_all_logprobs_are_exact(lab: ModuleType, deterministic: bool) -> None:
    model = lab.build("llama")
    engine = lab.engine_of(model, max_slots=5, prefill_tokens=16, deterministic=deterministic)
    # One mate ends while the prompt is computed: its row is filled, and the prompt's own moves.
    mates = [lab.request(i, range(5), seed=9, max_tokens=count) for i, count in enumerate((4, 30))]
    samples = long_samples(lab, 3)
    engine.submit([*mates, *samples])
    finished = {outcome.sequence_id: outcome for _ in range(4) for outcome in engine.step()}
    assert (engine.live, engine.free_slots, sorted(finished)) == (1, 1, [0])
    finished |= rest(engine)
    assert len({got.token_ids.tobytes() for i, got in finished.items() if i >= 50}) == 3
    for asked in (*mates, *samples):
        got = finished[asked.sequence_id]
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("mode", list(SwapMode))
def test_a_swap_in_the_middle_of_a_prompt_leaves_no_old_keys_in_it(lab: ModuleType, mode: SwapMode) -> None:
    old, new = lab.build("llama", seed=0), lab.build("llama", seed=1)
    engine = lab.engine_of(lab.build("llama", seed=0), prefill_tokens=16)
    samples = long_samples(lab, 2)
    engine.submit(samples)
    engine.step()
    swap = engine.swap(StagedWeights(lab.V2, new.state_dict()), mode)
    finished = rest(engine)
    assert swap.result() == lab.V2
    model, version = (old, lab.V1) if mode is SwapMode.DRAIN else (new, lab.V2)
    for asked in samples:
        got = finished[asked.sequence_id]
        assert got.runs == (TokenRun(version, 9),)
        expected = lab.full_logprobs(model, asked.prompt_ids, got.token_ids, 1.0)
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)


def test_cancelled_samples_of_a_prompt_in_pieces_leave_the_others(lab: ModuleType) -> None:
    engine = lab.engine_of(lab.build("llama"), prefill_tokens=16)
    engine.submit(long_samples(lab, 3))
    engine.step()
    engine.cancel([50, 52])
    assert sorted(rest(engine)) == [51]
    engine.submit(long_samples(lab, 1))
    engine.step()
    engine.cancel([50])
    engine.step()
    assert not engine.has_work and engine.free_slots == 4
    engine.submit(long_samples(lab, 2))
    engine.step()
    assert engine.reset() == [50, 51] and not engine.has_work

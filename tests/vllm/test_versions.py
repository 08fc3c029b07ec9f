"""New versions in the vllm engine: loaded in place, proven, every token stamped; refused where they came out wrong.

The policies have tied embeddings, which vLLM reloads only in part by itself.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tests.vllm.room import MAX_LENGTH, VOCAB_SIZE, full_logprobs, llama, save_policy, settings_of
from trimtab.generator.config import GeneratorConfig
from trimtab.generator.engine import (
    Engine,
    FailedSequence,
    FailureReason,
    FinishedSequence,
    Sampling,
    SequenceRequest,
    StagedWeights,
    SwapMode,
)
from trimtab.generator.loading import load_policy
from trimtab.generator.vllm.start import start_engine
from trimtab_client import ModelVersion

SLOTS = 6
LONG = Sampling(400, ignore_eos=True)
PROMPT = np.arange(200, dtype=np.int32) % 250


@dataclass
class Lab:
    """An engine and the policies it can serve, by step."""

    engine: Engine
    folders: dict[int, Path]
    next_id: int = 0

    def requests(self, count: int, prompt: np.ndarray = PROMPT, sampling: Sampling = LONG) -> list[SequenceRequest]:
        ids = range(self.next_id, self.next_id + count)
        self.next_id += count
        return [SequenceRequest(index, prompt, ids[0], index, sampling) for index in ids]

    def swap(self, step: int, mode: SwapMode, folder: Path | None = None) -> Future[ModelVersion]:
        """Ask for a version; `folder` is where vLLM finds it instead."""
        model = AutoModelForCausalLM.from_pretrained(self.folders[step], dtype=torch.float32)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        staged = StagedWeights(ModelVersion("run", "policy", step), tensors, folder or self.folders[step])
        return self.engine.swap(staged, mode)

    def drive(self, until: Future[ModelVersion] | None = None) -> list[FinishedSequence | FailedSequence]:
        """Step until the swap is done, or there is nothing more to do; every outcome."""
        outcomes = []
        while self.engine.has_work if until is None else not until.done():
            outcomes += self.engine.step()
        return outcomes

    def check(self, outcome: FinishedSequence | FailedSequence, *, all_runs: bool = True) -> list[int]:
        """Compare log-probs with full forwards of the versions that sampled (the first only, or all); their steps."""
        assert isinstance(outcome, FinishedSequence), outcome
        start, tokens = 0, outcome.token_ids.tolist()
        assert sum(run.token_count for run in outcome.runs) == len(tokens)
        for run in outcome.runs:
            end = start + run.token_count
            if start == 0 or all_runs:
                expected = full_logprobs(self.folders[run.version.step], PROMPT.tolist(), tokens)
                np.testing.assert_allclose(outcome.logprobs[start:end], expected[start:end], atol=1e-4)
            start = end
        return [run.version.step for run in outcome.runs]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("policies")
    folders = {step: save_policy(root / str(step), step, llama(tied=True)) for step in (0, 1, 2)}
    yield from running(folders)


def running(folders: dict[int, Path], on_failure: Callable[[str], object] = pytest.fail) -> Iterator[Lab]:
    config = GeneratorConfig(**settings_of(folders[0], max_slots=SLOTS))
    engine = start_engine(config, load_policy(config, None), MAX_LENGTH, on_failure)
    try:
        yield Lab(engine, folders)
    finally:
        engine.close()


@pytest.mark.parametrize("mode", list(SwapMode))
def test_a_swap_under_load_fails_no_sequence_and_marks_every_token(lab: Lab, mode: SwapMode) -> None:
    before = lab.engine.version.step
    later = [step for step in (1, 2, 0) if step != before][:2]
    lab.engine.submit(lab.requests(2 * SLOTS))
    while lab.engine.waiting > SLOTS:
        lab.engine.step()
    outcomes = []
    for step in later:
        swapping = lab.swap(step, mode)
        outcomes += lab.drive(swapping)
        assert swapping.result().step == lab.engine.version.step == step
    outcomes += lab.drive()
    # The prompt's blocks are there from all the versions before.
    lab.engine.submit(lab.requests(1))
    (last,) = lab.drive()
    assert len(outcomes) == 2 * SLOTS and lab.check(last) == [later[-1]]
    seen = [lab.check(outcome, all_runs=mode is SwapMode.RECOMPUTE_KV) for outcome in outcomes]
    assert {len(outcome.token_ids) for outcome in outcomes} == {MAX_LENGTH - len(PROMPT)}
    mixed = [steps for steps in seen if len(steps) > 1]
    assert len(mixed) == 0 if mode is SwapMode.DRAIN else len(mixed) >= SLOTS
    assert seen.count([before]) >= SLOTS if mode is SwapMode.DRAIN else [before] not in seen


def test_cancelled_sequences_leave_without_an_outcome(lab: Lab) -> None:
    lab.engine.submit(requests := lab.requests(2 * SLOTS))
    while lab.engine.live < SLOTS:
        lab.engine.step()
    lab.engine.cancel([request.sequence_id for request in requests])
    assert lab.drive() == []
    assert (lab.engine.live, lab.engine.waiting, lab.engine.free_slots) == (0, 0, SLOTS)


def test_sequences_hold_back_the_version_they_refuse(lab: Lab) -> None:
    served = lab.engine.version
    new = (served.step + 1) % 3
    held, late = lab.requests(2)
    pinned = [SequenceRequest(**{**vars(request), "accepts": lambda v: v == served}) for request in (held, late)]
    lab.engine.submit(pinned[:1])
    swapping = lab.swap(new, SwapMode.KEEP)
    (outcome,) = lab.drive(swapping)
    assert lab.check(outcome) == [served.step] and lab.engine.version.step == new
    lab.engine.submit(pinned[1:])
    (refused,) = lab.drive()
    assert isinstance(refused, FailedSequence) and refused.reason is FailureReason.VERSION


def test_weights_that_vllm_did_not_load_as_they_are_are_refused_and_put_back(lab: Lab, tmp_path: Path) -> None:
    """vLLM finds a folder in which a small part of a small step is missing."""
    served = lab.engine.version
    lab.folders[7] = save_step(lab.folders[served.step], tmp_path / "trained", skip="")
    half = save_step(lab.folders[served.step], tmp_path / "half", skip="embed_tokens")
    lab.engine.submit(lab.requests(SLOTS + 2))
    refused = lab.swap(7, SwapMode.KEEP, half)
    outcomes = lab.drive(refused)
    with pytest.raises(ValueError, match="serves on: vLLM's log-probs of it differ"):
        refused.result()
    assert lab.engine.version == served
    outcomes += lab.drive()
    failed = [outcome for outcome in outcomes if isinstance(outcome, FailedSequence)]
    assert len(outcomes) == SLOTS + 2 and {outcome.reason for outcome in failed} == {FailureReason.BROKEN}
    kept = [outcome for outcome in outcomes if isinstance(outcome, FinishedSequence)]
    assert kept and all(lab.check(outcome) == [served.step] for outcome in kept)
    accepted = lab.swap(7, SwapMode.KEEP)
    lab.drive(accepted)
    assert accepted.result().step == lab.engine.version.step == 7
    wide = lab.swap(7, SwapMode.KEEP, tmp_path / "nowhere")
    lab.drive(wide)
    with pytest.raises(ValueError, match="did not take it"):
        wide.result()
    lab.engine.submit(lab.requests(1))
    assert lab.check(lab.drive()[0]) == [7]


def test_a_version_made_ready_beside_the_served_one_is_not_read_again(lab: Lab, tmp_path: Path) -> None:
    """Its folder is gone when requests are paused for it."""
    served = lab.engine.version
    new = (served.step + 1) % 3
    folder = shutil.copytree(lab.folders[new], tmp_path / "new")
    tensors = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    staged = StagedWeights(ModelVersion("run", "policy", new), {name: t.clone() for name, t in tensors.items()}, folder)
    engine: Any = lab.engine
    weights = engine._weights

    async def change() -> ModelVersion:
        await weights.stage(staged)
        shutil.rmtree(folder)
        return await weights.change(staged, weights.expected(staged), recompute_kv=False)

    assert asyncio.run_coroutine_threadsafe(change(), engine._loop).result().step == new
    engine.submit(lab.requests(2))
    assert [lab.check(outcome) for outcome in lab.drive()] == [[new]] * 2
    back = lab.swap(served.step, SwapMode.KEEP)  # what refuses a later version loads this one's folder again
    lab.drive(back)
    assert back.result().step == served.step


def test_an_engine_that_cannot_go_back_ends_and_samples_no_more(tmp_path: Path) -> None:
    """What it computes with is known no more: the folder of the version before is gone when it is needed."""
    served = save_policy(tmp_path / "served", 0, llama(tied=True))
    half = save_step(served, tmp_path / "half", skip="embed_tokens")
    folders = {0: served, 7: save_step(served, tmp_path / "trained", skip="")}
    ended: list[str] = []
    with contextmanager(running)(folders, ended.append) as lab:
        lab.engine.submit(lab.requests(SLOTS + 2))
        shutil.rmtree(served)
        refused = lab.swap(7, SwapMode.KEEP, half)
        outcomes = lab.drive(refused)
        with pytest.raises(RuntimeError, match="ends"):
            refused.result()
        outcomes += lab.drive()
    lost = [outcome for outcome in outcomes if isinstance(outcome, FailedSequence)]
    assert lost and {outcome.reason for outcome in lost} == {FailureReason.LOST} and ended


def save_step(source: Path, folder: Path, *, skip: str) -> Path:
    """The model of `source` after a step as small as one of training; what is named `skip` stays as it was."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = torch.randn_like(parameter) * 1e-4
            if not skip or skip not in name:
                parameter.add_(change)
    model.save_pretrained(folder)
    return folder


def test_another_architecture_with_tied_embeddings_is_loaded_whole(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=MAX_LENGTH, n_embd=64, n_layer=2, n_head=2)
    folders = {step: save_policy(tmp_path / str(step), step, config) for step in (0, 1)}
    for lab in running(folders):
        lab.drive(lab.swap(1, SwapMode.DRAIN))
        lab.engine.submit(lab.requests(2))
        assert [lab.check(outcome) for outcome in lab.drive()] == [[1], [1]]

"""A generator process on vLLM: the contract's numbers, the local engine's tokens, new versions, and its end.

The tests share one process, which the last of them ends.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.vllm.room import CALL_S, MAX_LENGTH, Served, full_logprobs, llama, local_samples, save_policy, serving
from trimtab.generator import engine as engines
from trimtab.weights.store import open_store
from trimtab_client import (
    AtLeast,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ModelVersion,
    NotFound,
    ResourceExhausted,
    Sampling,
    Unavailable,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies of one architecture, and one that does not fit."""
    root, wide = tmp_path_factory.mktemp("policies"), llama()
    wide.hidden_size = 128
    return [save_policy(root / "1", 1), save_policy(root / "2", 2), save_policy(root / "wide", 1, wide)]


@pytest.fixture(scope="module")
def served(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serves run/policy@1 of three versions."""
    root = tmp_path_factory.mktemp("served")
    store = open_store(str(root / "store"))
    for step, folder in enumerate(folders, 1):
        store.publish(folder, run_id="run", name="policy", step=step, set_current=step == 1)
    with serving(root, "version:run/policy", store=store.url, queue_limit=8) as served:
        yield served


NARROWED = [
    Sampling(n=2, max_tokens=9, temperature=0.8, ignore_eos=True, seed=4),
    Sampling(n=2, max_tokens=9, temperature=1.3, top_p=0.7, top_k=20, ignore_eos=True, seed=5),
    Sampling(n=1, max_tokens=9, temperature=0.0, ignore_eos=True),
    Sampling(n=2, max_tokens=40, temperature=1.5, min_tokens=30, stop_token_ids=tuple(range(100)), seed=6),
]


@pytest.mark.parametrize("sampling", NARROWED)
def test_logprobs_are_of_the_full_vocabulary_at_the_sampling_temperature(
    served: Served, folders: list[Path], sampling: Sampling
) -> None:
    prompts = [list(range(5)), list(range(40, 60)), [7], list(range(200, 40, -1)) * 2]
    with served.client() as client:
        got = list(client.generate(prompts, sampling, timeout_s=CALL_S))
    assert {(c.prompt_index, c.sample_index) for c in got} == {(p, s) for p in range(4) for s in range(sampling.n)}
    for completion in got:
        prompt, tokens = prompts[completion.prompt_index], completion.token_ids.tolist()
        assert completion.prompt_token_ids.tolist() == prompt
        expected = full_logprobs(folders[0], prompt, tokens, sampling.temperature or 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)
        (run,) = completion.versions
        assert (run.token_count, run.version.step) == (len(tokens), 1)
        if sampling.min_tokens:
            assert len(tokens) >= 30 and not any(token < 100 for token in tokens[:29])
            assert completion.finish_reason == ("stop" if tokens[-1] < 100 or tokens[-1] == 257 else "length")
        else:
            assert len(tokens) == 9 and completion.finish_reason == "length"


def test_a_seed_gives_the_tokens_text_and_end_that_the_local_engine_gives(served: Served, folders: list[Path]) -> None:
    stops = ("e", "qu")
    ways = [
        Sampling(max_tokens=60, temperature=0.9),
        Sampling(max_tokens=60, temperature=1.1, stop=stops),
        Sampling(max_tokens=60, temperature=1.1, stop=stops, min_tokens=20, ignore_eos=True),
        Sampling(max_tokens=60, temperature=1.0, stop_token_ids=(3, 9, 12, 40), top_p=0.9, top_k=50),
        Sampling(max_tokens=600, temperature=0.7, ignore_eos=True, stop=("\n\n\n\n",)),
        Sampling(max_tokens=60, temperature=1.4, min_tokens=25, stop_token_ids=tuple(range(80))),
    ]
    reasons = set()
    for way in ways:
        prompts = [list(range(9)), [256, 70, 80, 90], list(range(30, 130))]
        seeds = [[2**64 - 1 - index, 17 + index] for index in range(len(prompts))]
        rules = engines.Sampling(
            way.max_tokens, way.temperature, way.top_p, way.top_k, way.min_tokens, way.stop, way.stop_token_ids,
            way.ignore_eos,
        )  # fmt: skip
        wanted = local_samples(
            folders[0], [(p, s, rules) for p, pair in zip(prompts, seeds, strict=True) for s in pair]
        )
        with served.client() as client:
            call = client.generate(prompts, Sampling(**{**vars(way), "n": 2}), seeds=seeds, timeout_s=CALL_S)
            got = {(c.prompt_index, c.sample_index): c for c in call}
        for index, expected in enumerate(wanted):
            completion = got[divmod(index, 2)]
            assert completion.token_ids.tolist() == expected.token_ids.tolist()
            assert (completion.text, completion.finish_reason) == (expected.text, expected.finish_reason.value)
            np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=2e-5)
            assert len(completion.token_ids) + len(completion.prompt_token_ids) <= MAX_LENGTH
            reasons.add((bool(way.stop), completion.finish_reason))
    assert len(reasons) == 4  # each of both ends was met with and without stop strings


def test_samples_of_a_seed_do_not_depend_on_company(served: Served) -> None:
    with served.client() as client:
        alone = list(client.generate([[5, 6, 7]], Sampling(max_tokens=50, ignore_eos=True), [[3]], timeout_s=CALL_S))
        prompts = [[5, 6, 7], [9] * 30, [8] * 100, [4], [3] * 60]
        seeds = [[3], *([index] for index in range(10, 14))]
        got = list(client.generate(prompts, Sampling(max_tokens=50, ignore_eos=True), seeds, timeout_s=CALL_S))
    again = next(completion for completion in got if completion.prompt_index == 0)
    assert again.token_ids.tolist() == alone[0].token_ids.tolist()


def test_each_completion_is_sent_as_it_finishes_and_a_full_queue_refuses(served: Served) -> None:
    with served.client() as client:
        with pytest.raises(ResourceExhausted):
            list(client.generate([[9] * 9] * 17, Sampling(max_tokens=500), timeout_s=CALL_S))
        # Within one call short ones do not wait for long ones.
        tokens = next(client.generate([[9] * 9], Sampling(max_tokens=400, seed=1, ignore_eos=True))).token_ids
        stop = Sampling(n=2, max_tokens=400, seed=1, ignore_eos=True, stop_token_ids=(int(tokens[5]),))
        lengths = [len(completion.token_ids) for completion in client.generate([[9] * 9], stop, timeout_s=CALL_S)]
        assert lengths == sorted(lengths) and lengths[0] <= 6


def test_a_deadline_ends_the_work_and_bad_input_is_refused(served: Served) -> None:
    with served.client() as client:
        with pytest.raises(DeadlineExceeded):
            list(client.generate([[9] * 9] * 16, Sampling(max_tokens=500, ignore_eos=True), timeout_s=0.3))
        assert len(list(client.generate([[1]], Sampling(max_tokens=1), timeout_s=CALL_S))) == 1
        with pytest.raises(InvalidArgument, match="vocabulary"):
            list(client.generate([[999]], timeout_s=CALL_S))
        assert client.get_model().max_length == MAX_LENGTH


def test_a_version_is_loaded_and_what_does_not_fit_is_refused(served: Served, folders: list[Path]) -> None:
    sampling = Sampling(n=2, max_tokens=20, ignore_eos=True, seed=1)
    with served.client() as client:
        for step, error in ((3, FailedPrecondition), (9, NotFound)):
            with pytest.raises(error):
                client.load_version(ModelVersion("run", "policy", step), timeout_s=CALL_S)
        assert client.load_version(ModelVersion("run", "policy", 2), timeout_s=CALL_S).version.step == 2
        got = list(client.generate([[*range(40)], [5]], sampling, version=AtLeast(2), timeout_s=CALL_S))
        with pytest.raises(FailedPrecondition):
            list(client.generate([[1]], version=ModelVersion("run", "policy", 1), timeout_s=CALL_S))
    for completion in got:
        assert [(run.version.step, run.token_count) for run in completion.versions] == [(2, 20)]
        expected = full_logprobs(folders[1], completion.prompt_token_ids.tolist(), completion.token_ids.tolist())
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


def test_a_server_whose_vllm_died_answers_unavailable_and_ends_with_an_error(served: Served) -> None:
    """The last test of this file: nothing is left to serve afterwards."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    with served.client() as client:
        call = client.generate([[9] * 9], Sampling(max_tokens=480, ignore_eos=True), timeout_s=CALL_S)
        core.kill()
        with pytest.raises(Unavailable):
            list(call)
    assert served.process.wait(60) == 1, served.log.read_text()[-6000:]
    assert "cannot serve generator any more" in served.log.read_text()
    psutil.wait_procs(children, timeout=60)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)

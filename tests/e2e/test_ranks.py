"""A trainer of two ranks as a job under torchrun: each stage over gRPC, and kill -9 of either rank in mid-run."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import json_format

from tests.e2e.killing import Site, ppo_config, site
from tests.e2e.rank_jobs import TORCHRUN, Job
from tests.e2e.test_kill import MODEL, processes_of, sentences, write_rows
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def farthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def demonstrations(folder: Path) -> Path:
    texts = sentences(48, 1)
    rows = [{"prompt": text, "completion": f" {other}"} for text, other in zip(texts, sentences(48, 2), strict=True)]
    return write_rows(folder / "demonstrations.jsonl", rows)


def sft_values(folder: Path) -> dict:
    data = str(demonstrations(folder))
    stage = {"model": str(MODEL), "max_length": 64, "checkpoint_every_steps": 2, "micro_batch_tokens": 128}
    stage["optimizer"] = {"learning_rate": 1e-3}
    return {"stage": stage, "data": data, "validation_data": data, "epochs": 3, "batch_size": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What one rank makes of the demonstrations."""
    folder = tmp_path_factory.mktemp("alone")
    return Job(folder, "run", "sft", sft_values(folder)).weights("policy")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_comes_back_by_torchrun_and_the_run_goes_on_from_its_last_step(alone, tmp_path, victim):
    job = Job(tmp_path, "run", "sft", sft_values(tmp_path), torchrun=TORCHRUN)
    job.kill_rank_after(victim, 5)
    assert farthest(job.weights("policy"), alone) < 1e-5
    assert [row["step"] for row in job.rows()] == list(range(1, 19))
    assert "restarts left" in (tmp_path / "log").read_text() or "following" in (tmp_path / "log").read_text()
    assert processes_of(tmp_path) == []


def test_kill_9_of_the_job_takes_torchrun_and_ranks_along_and_the_next_job_goes_on(alone, tmp_path):
    job = Job(tmp_path, "run", "sft", sft_values(tmp_path), torchrun=TORCHRUN)
    job.wait_for(lambda: job.runs(0) and job.runs(1))  # they still import: not tied yet
    job.kill()
    eventually(lambda: processes_of(tmp_path) == [])
    job = Job(tmp_path, "run", "sft", sft_values(tmp_path), torchrun=TORCHRUN)
    job.wait_for(lambda: len(job.rows()) >= 5)
    job.kill()
    eventually(lambda: processes_of(tmp_path) == [], timeout_s=5)
    job = Job(tmp_path, "run", "sft", sft_values(tmp_path), torchrun=TORCHRUN)
    assert farthest(job.weights("policy"), alone) < 1e-5
    assert [row["step"] for row in job.rows()] == list(range(1, 19))


def test_two_ranks_make_the_reward_model_of_one(tmp_path):
    random = np.random.default_rng(0)
    rows = [
        {"prompt": text, "responses": [f" {answer}" for answer in sentences(4, 100 + number)], "ranks": ranks.tolist()}
        for number, text in enumerate(sentences(24, 3))
        for ranks in [random.permutation(4) + 1]
    ]
    data = str(write_rows(tmp_path / "rankings.jsonl", rows))
    stage = {"model": str(MODEL), "micro_batch_tokens": 256, "optimizer": {"learning_rate": 1e-3}}
    values = {"stage": stage, "data": data, "validation_data": data, "batch_prompts": 6, "epochs": 2}
    one = Job(tmp_path / "one", "run", "reward", values).weights("reward")
    two = Job(tmp_path / "two", "run", "reward", values, torchrun=TORCHRUN).weights("reward")
    assert farthest(two, one) < 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    ScalarModel.from_policy(Policy.load(str(MODEL)), seed=3).save(folder / "reward-model")
    with site(folder, MODEL, folder / "reward-model") as made:
        yield made


def test_ppo_on_two_ranks_takes_the_steps_of_one_and_outlives_a_killed_rank(place):
    prompts = write_rows(place.folder / "prompts.jsonl", [{"prompt": text} for text in sentences(20, 0)])
    config = ppo_config(place, prompts, kl_coefficient=0.05, no_eos_score=-1.0)
    config.stage.model = str(MODEL)
    config.stage.optimizer.learning_rate = 1e-5  # ranks add up in another order: at more, a token is drawn differently
    values = json_format.MessageToDict(config, preserving_proto_field_name=True)
    one = Job(place.folder, "one", "ppo", values)
    weights = one.weights("policy")
    two = Job(place.folder, "two", "ppo", values, torchrun=TORCHRUN)
    two.kill_rank_after(1, 3)
    start = dict(Policy.load(str(MODEL)).model.named_parameters())
    assert farthest(two.weights("policy"), weights) < 0.1 * farthest(start, weights)
    ours, theirs = two.rows(), one.rows()
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, 7))
    for name in ("normalized_score_mean", "loss_policy", "loss_value", "grad_norm_policy", "kl_nats_per_sequence"):
        np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=1e-3, atol=1e-4)

"""Runs that were cut off go on where they were, at a trainer that starts anew, and end with the same weights."""

import json
import shutil
from pathlib import Path

import pytest

from tests.services.test_trainer import (
    COMMON,
    finished,
    ppo_config,
    rankings,
    reached,
    serving_all,
    serving_trainer,
    sft_config,
    write_rows,
)
from trimtab.runtime.server import RunningServer
from trimtab.trainer import service
from trimtab.trainer.config import TrainerConfig
from trimtab.trainer.optimizer import learning_rate
from trimtab.trainer.ppo import loop
from trimtab.weights.store import open_store
from trimtab_client import AlreadyExists, AsyncTrainerClient, FailedPrecondition, InvalidArgument, NotFound
from trimtab_client.v1 import trainer_pb2


def final_digest(tmp_path: Path, run_id: str, name: str) -> str:
    version = open_store(str(tmp_path / "store")).current_version(run_id, name)
    assert version is not None
    return version.digest


def reward_config(model: Path, tmp_path: Path) -> trainer_pb2.RewardModelConfig:
    config = trainer_pb2.RewardModelConfig(data=rankings(tmp_path, 60), epochs=3, batch_prompts=8)
    config.stage.model = str(model)
    config.stage.optimizer.learning_rate = 5e-3
    return config


async def cut_off(client: AsyncTrainerClient, config, step: int) -> int:
    """Start "run", stop it once it has passed `step`; the step where it stopped."""
    await client.start("run", config)
    await reached(client, lambda status: status.step >= step)
    await client.stop("run")
    status, _ = await finished(client, "run")
    assert status.state == "stopped" and step <= status.step < status.total_steps
    return status.step


@pytest.mark.parametrize("stage", ["sft", "reward"])
async def test_a_stage_that_was_cut_off_between_checkpoints_ends_with_the_weights_it_would_have_had(
    make_tiny, tmp_path, stage
):
    model = make_tiny("policy")
    if stage == "sft":
        config, name = sft_config(model, tmp_path, epochs=40, dropout=0.1), "policy"
    else:
        config, name = reward_config(model, tmp_path), "reward"
    config.stage.checkpoint_every_steps = 4
    home = tmp_path / "home"
    async with serving_trainer(home) as client:
        await client.start("run", config)
        await reached(client, lambda status: status.step >= 5)
        await client.pause("run")
        await reached(client, lambda status: status.state == "paused")
        shutil.copytree(home, tmp_path / "cut-off")  # what a kill now would leave on the disk
        assert list((tmp_path / "cut-off").glob("runs/run/state/checkpoints/0*"))
        await client.resume("run")
        _, calm_metrics = await finished(client, "run")
    async with serving_trainer(tmp_path / "cut-off") as client:
        await client.start("run", config)
        status, metrics = await finished(client, "run")
    assert status.state == "succeeded", status.error
    assert final_digest(tmp_path / "cut-off", "run", name) == final_digest(home, "run", name)
    assert [row.step for row in metrics] == [row.step for row in calm_metrics]
    assert [row.values["loss"] for row in metrics] == [row.values["loss"] for row in calm_metrics]
    assert not (home / "runs" / "run" / "state" / "checkpoints").exists()  # it has ended well


async def test_another_config_under_a_known_run_id_is_refused_with_the_field(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with serving_trainer(tmp_path) as client:
        await cut_off(client, sft_config(model, tmp_path, epochs=200), 3)
    async with serving_trainer(tmp_path) as client:
        with pytest.raises(AlreadyExists, match="batch_size 8, not 4") as refused:
            await client.start("run", sft_config(model, tmp_path, epochs=200, batch_size=4))
        assert refused.value.field == "sft.batch_size"
        with pytest.raises(AlreadyExists):
            await client.start("run", reward_config(model, tmp_path))


async def test_a_run_that_failed_before_its_first_step_may_start_with_its_mistake_put_right(make_tiny, tmp_path):
    config = sft_config(make_tiny("policy"), tmp_path)
    wrong = trainer_pb2.SftConfig()
    wrong.CopyFrom(config)
    wrong.data = str(tmp_path / "nowhere.jsonl")
    async with serving_trainer(tmp_path) as client:
        await client.start("run", wrong)
        assert (await finished(client, "run"))[0].state == "failed"
        await client.start("run", config)
        status, _ = await finished(client, "run")
    assert status.state == "succeeded", status.error


async def test_a_run_that_has_succeeded_is_not_run_again(make_tiny, tmp_path):
    config = sft_config(make_tiny("policy"), tmp_path)
    async with serving_trainer(tmp_path) as client:
        await client.start("run", config)
        before, metrics = await finished(client, "run")
    async with serving_trainer(tmp_path) as client:
        status = await client.start("run", config)
        _, again = await finished(client, "run")
    assert status.state == "succeeded" and status.step == 6 and status.published == before.published
    assert [row.values["loss"] for row in again] == [row.values["loss"] for row in metrics]


async def test_runs_of_before_can_be_looked_at_without_being_started_again(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with serving_trainer(tmp_path) as client:
        await client.start("ended", sft_config(model, tmp_path))
        before, metrics = await finished(client, "ended")
        await cut_off(client, sft_config(model, tmp_path, epochs=200), 3)
    (tmp_path / "runs" / "run" / "state" / "outcome.json").unlink()  # as a kill leaves it
    async with serving_trainer(tmp_path) as client:
        status, again = await finished(client, "ended")
        assert status.state == "succeeded" and status.published == before.published
        assert [row.values["loss"] for row in again] == [row.values["loss"] for row in metrics]
        newest = await client.status()
        assert newest.run_id == "run" and newest.state == "stopped" and newest.step >= 3
        assert newest.error == "it has not ended: start it again, as it was, and it goes on"
        with pytest.raises(NotFound, match="no run other here; there are run, ended"):
            await client.status("other")
        with pytest.raises(InvalidArgument):
            await client.status("../runs/ended")
        with pytest.raises(FailedPrecondition, match="has ended"):
            await client.pause("run")
        await client.start("run", sft_config(model, tmp_path, epochs=200))
        await reached(client, lambda status: status.state == "running" and status.step > newest.step)


async def test_data_that_changed_meanwhile_is_refused(make_tiny, tmp_path):
    config = sft_config(make_tiny("policy"), tmp_path, epochs=200)
    async with serving_trainer(tmp_path) as client:
        await cut_off(client, config, 3)
        write_rows(tmp_path / "sft.jsonl", [{"prompt": "w1", "completion": " w2"}] * 24)
        await client.start("run", config)
        status, _ = await finished(client, "run")
    assert status.state == "failed" and status.error.startswith("data: it is not what")


async def test_a_checkpoint_that_was_asked_for_outlives_a_kill_right_after_it(make_tiny, tmp_path):
    config = sft_config(make_tiny("policy"), tmp_path, epochs=200)
    config.stage.checkpoint_every_steps = 10_000
    async with serving_trainer(tmp_path) as client:
        await client.start("run", config)
        (version,) = await client.checkpoint("run")
        saved = [int(path.name) for path in (tmp_path / "runs/run/state/checkpoints").glob("0*")]
        await client.stop("run")
        await finished(client, "run")
    assert saved == [version.step]


async def test_two_trainers_never_work_on_one_run(make_tiny, tmp_path):
    config = sft_config(make_tiny("policy"), tmp_path, epochs=2000)
    async with serving_trainer(tmp_path) as one, serving_trainer(tmp_path) as other:
        await one.start("run", config)
        await reached(one, lambda status: status.step >= 1)
        await other.start("run", config)
        status, _ = await finished(other, "run")
        assert status.state == "failed" and "process" in status.error
        with pytest.raises(FailedPrecondition):
            await other.pause("run")
        await one.stop("run")
        assert (await finished(one, "run"))[0].state == "stopped"


async def test_a_trainer_elsewhere_cannot_publish_a_run_that_is_going(make_tiny, tmp_path):
    config = sft_config(make_tiny("policy"), tmp_path, epochs=2000)
    async with serving_trainer(tmp_path, lease_ttl_s=1) as one:
        await one.start("run", config)
        await reached(one, lambda status: status.step >= 1)
        settings = {"store": str(tmp_path / "store"), "folder": tmp_path / "elsewhere", "lease_ttl_s": 1}
        elsewhere = TrainerConfig(**COMMON, **settings)  # type: ignore[arg-type]
        server = RunningServer(service.LABEL, elsewhere, services=service.SERVICES, load=service.load)
        async with server, AsyncTrainerClient(server.address) as other:
            await other.start("run", config)
            status, _ = await finished(other, "run")
        assert status.state == "failed" and "run run is being published to by" in status.error
        assert (await one.checkpoint("run"))[0].step > 1
        await one.stop("run")
        await finished(one, "run")


@pytest.mark.parametrize(("staleness", "old_logprobs"), [(0, "generator"), (1, "trainer")])
async def test_a_stopped_ppo_run_goes_on_without_counting_a_step_twice(make_tiny, tmp_path, staleness, old_logprobs):
    model, reward_model = make_tiny("policy"), make_tiny("reward", seed=3)
    async with serving_all(model, tmp_path, reward_model) as (client, addresses):
        config = ppo_config(
            model,
            tmp_path,
            addresses,
            addresses[2],
            value_model=str(reward_model),
            steps=9,
            max_staleness=staleness,
            old_logprobs=old_logprobs,
            ema_decay=0.9,
            adaptive_kl_target=2.0,
            adaptive_kl_horizon=100.0,
        )
        config.stage.checkpoint_every_steps = 4
        await cut_off(client, config, 5)
        async with serving_trainer(tmp_path) as other:
            await other.start("run", config)
            status, metrics = await finished(other, "run")
        assert status.state == "succeeded", status.error
    assert [row.step for row in metrics] == list(range(1, 10))
    assert [version.name for version in status.published[-2:]] == ["policy-ema", "policy"]
    rows = [json.loads(line) for line in (tmp_path / "runs/run/samples.jsonl").open(encoding="utf-8")]
    samples = [(row["step"], row["seed"]) for row in rows]
    assert sorted({step for step, _ in samples}) == list(range(1, 10)) and len(set(samples)) == len(samples)
    assert [step for step, _ in samples] == sorted(step for step, _ in samples)
    assert max(row.values["staleness_mean"] for row in metrics) <= staleness
    assert all(("logprob_gap_mean" in row.values) == (old_logprobs == "trainer") for row in metrics)
    firsts = [abs(row.values["approx_kl_first_minibatch"]) for row in metrics]
    assert max(firsts) <= (1e-5 if old_logprobs == "generator" else 0)


@pytest.mark.parametrize(("staleness", "left_of_journal"), [pytest.param(0, 1.0, marks=pytest.mark.slow), (3, 0.7)])
async def test_a_replay_with_other_last_bits_keeps_what_was_published_though_it_is_pruned(
    make_tiny, tmp_path, monkeypatch, staleness, left_of_journal
):
    """Killed before its first checkpoint it trains all steps again, and samples anew what the journal lacks."""
    model, reward_model = make_tiny("policy"), make_tiny("reward", seed=3)
    runs, killed = tmp_path / "runs", tmp_path / "killed"
    async with serving_all(model, tmp_path, reward_model) as (_, addresses):
        settings = {"value_model": str(reward_model), "steps": 9, "max_staleness": staleness}
        config = ppo_config(model, tmp_path, addresses, addresses[2], **settings)
        async with serving_trainer(tmp_path, keep_versions=1) as client:
            await client.start("run", config)
            await reached(client, lambda status: status.step >= 3)
            await client.pause("run")
            before = await reached(client, lambda status: status.state == "paused")
            shutil.copytree(runs, killed)
            await client.stop("run")
            await finished(client, "run")
        shutil.rmtree(runs)
        killed.rename(runs)
        journal = runs / "run" / "state" / "journal"
        journal.write_bytes(journal.read_bytes()[: int(journal.stat().st_size * left_of_journal)])
        monkeypatch.setattr(loop, "learning_rate", lambda *of: learning_rate(*of) * (1 + 1e-6))  # another device
        async with serving_trainer(tmp_path, keep_versions=1) as client:
            await client.start("run", config)
            status, metrics = await finished(client, "run")
    assert status.state == "succeeded", status.error
    assert [row.step for row in metrics] == list(range(1, 10))
    assert set(before.published[-1:]) <= set(status.published)

"""Rollouts in flight: admission by staleness, episodes that outlive a kill, services that are away for a while."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from benchmarks.overlap import TOKENIZER, ppo_config
from benchmarks.stand_ins import DIGEST, Delays, StandInGenerator, StandIns, standing_in
from trimtab.rounds.launchers.services import free_ports
from trimtab.trainer.journal import Journal
from trimtab.trainer.loop_thread import LoopThread
from trimtab.trainer.patience import ServiceLostError
from trimtab.trainer.ppo.pipeline import Pipeline, whole_steps
from trimtab.trainer.ppo.prompts import Sampler
from trimtab.trainer.ppo.rollouts import RolloutClients
from trimtab.trainer.run import Run, StopRun
from trimtab.trainer.stages import PpoConfig
from trimtab_client import ChannelOptions, ModelVersion
from trimtab_client.v1 import generator_pb2, model_pb2

QUICK = Delays(batch_size=8, generate_s=0.08, score_s=0.02, reference_s=0.02)
NAMES = ("generator", "reward", "reference")


def version(step: int) -> ModelVersion:
    return ModelVersion("run", "policy", step, f"blake3:{step}")


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


class FullDisk(StandInGenerator):
    """Takes no version; a call that is pinned to one waits in vain, as a real generator lets it."""

    async def LoadVersion(self, request: object, context: grpc.aio.ServicerContext) -> model_pb2.LoadVersionResponse:
        return await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room for the version")

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.asked.append([])
        await asyncio.sleep(600)
        yield generator_pb2.GenerateResponse()


@contextmanager
def serving(
    delays: Delays = QUICK,
    ports: dict[str, int] | None = None,
    generator: type[StandInGenerator] = StandInGenerator,
) -> Iterator[StandIns]:
    with closing(LoopThread("stand-ins")) as loop:
        servers = standing_in(delays, ports, generator)
        try:
            yield loop.submit(servers.__aenter__()).result()
        finally:
            loop.submit(servers.__aexit__(None, None, None)).result()


@contextmanager
def pipeline(config: PpoConfig, folder: Path, run: Run | None = None) -> Iterator[tuple[Pipeline, Journal]]:
    """A pipeline of a trainer that starts; leaving it is a kill as far as the services can tell."""
    run = run or Run("run", "ppo")
    prompts = Sampler([np.arange(1 + i, dtype=np.int32) for i in range(20)], 0)
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(folder / "journal")))
        loop = stack.enter_context(closing(LoopThread("rollouts")))
        clients = RolloutClients(config, TOKENIZER, run.hindered, ChannelOptions())
        clients.tokenizer_digest = DIGEST
        stack.callback(lambda: loop.submit(clients.close()).result())
        yield Pipeline(config, clients, prompts, journal, run, loop, 0), journal


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_prompts_are_sent_once_their_version_may_be_trained_and_not_before(tmp_path, staleness):
    with serving() as services:
        config = ppo_config(services.addresses, 8, 6, staleness)
        with pipeline(config, tmp_path) as (rollouts, _):
            for step in range(4):
                rollouts.admit(version(step))
                eventually(lambda: len(services.generator.asked) == min(6, step + 1 + staleness))  # noqa: B023
                batch = rollouts.take(step + 1)
                assert len(services.generator.asked) == min(6, step + 1 + staleness)
                ages = {step - run.version.step for e in batch.in_order for run in e.completion.versions}
                assert ages <= set(range(staleness + 1))


def test_episodes_come_in_the_order_of_their_prompts_with_their_own_seeds(tmp_path):
    with serving() as services, pipeline(ppo_config(services.addresses, 8, 1, 0), tmp_path) as (rollouts, _):
        rollouts.admit(version(0))
        episodes = rollouts.take(1).in_order
        assert [episode.completion.seed for episode in episodes] == services.generator.asked[0]
        assert [episode.completion.prompt_index for episode in episodes] == list(range(8))


def test_replicas_of_reward_and_reference_work_at_the_same_time(tmp_path):
    slow = Delays(batch_size=8, generate_s=0.08, score_s=3.2, reference_s=3.2)
    with serving(slow) as one, serving(slow) as other:
        both = {name: f"{one.addresses[name]},{other.addresses[name]}" for name in ("reward", "reference")}
        config = ppo_config(one.addresses | both, 8, 1, 0)
        with pipeline(config, tmp_path) as (rollouts, _):
            rollouts.admit(version(0))
            started = time.monotonic()
            batch = rollouts.take(1)
            took_s = time.monotonic() - started
    for device in (one.reward.device, other.reward.device, one.reference.device, other.reference.device):
        assert device.busy_s > 0.8
    assert took_s < 3.0, "one after the other they take 3.2 s"
    assert batch.clocks.score.busy_s < took_s, "calls at the same time count once"


def test_a_batch_that_was_whole_is_never_asked_for_again(tmp_path):
    with serving() as services:
        config = ppo_config(services.addresses, 8, 2, 0)
        with pipeline(config, tmp_path) as (rollouts, _):
            rollouts.admit(version(0))
            before = rollouts.take(1)
    with pipeline(config, tmp_path) as (rollouts, journal):  # nobody serves any more
        assert whole_steps(journal, 0, 8) == 1
        rollouts.admit(version(0))
        after = rollouts.take(1)
    assert after.sampler_state == before.sampler_state
    for ours, theirs in zip(after.in_order, before.in_order, strict=True):
        assert ours.completion.text == theirs.completion.text
        assert ours.completion.versions == theirs.completion.versions
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.array_equal(ours.reference_logprobs, theirs.reference_logprobs)


def test_of_a_batch_that_was_cut_off_only_what_is_missing_is_asked_for(tmp_path):
    slow = Delays(batch_size=8, generate_s=0.8, score_s=0.02, reference_s=0.02)
    with serving(slow) as services:
        config = ppo_config(services.addresses, 8, 2, 0)
        with pipeline(config, tmp_path) as (rollouts, journal):
            rollouts.admit(version(0))
            eventually(lambda: journal.count(1) >= 3)
        with closing(Journal(tmp_path / "journal")) as left:
            kept = set(left.read(1))
        assert 3 <= len(kept) < 8
        with pipeline(config, tmp_path) as (rollouts, _):
            rollouts.admit(version(0))
            batch = rollouts.take(1)
        first, second = services.generator.asked
        assert second == [seed for index, seed in enumerate(first) if index not in kept]
        assert [episode.completion.seed for episode in batch.in_order] == first


def test_a_service_that_comes_late_is_waited_for_with_the_reason_on_screen(tmp_path):
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    config = ppo_config({name: f"127.0.0.1:{port}" for name, port in ports.items()}, 8, 1, 0)
    run = Run("run", "ppo")
    with pipeline(config, tmp_path, run) as (rollouts, _):
        run.doing("generating")
        taken: list[int] = []
        waiting = threading.Thread(target=lambda: (rollouts.admit(version(0)), taken.append(len(rollouts.take(1)))))
        waiting.start()
        eventually(
            lambda: (
                f"generating; waiting for the generator at 127.0.0.1:{ports['generator']}, 600 s at most: "
                in run.snapshot.activity
            )
        )
        with serving(ports=ports):
            waiting.join(20)
    assert taken == [8] and run.snapshot.activity == "generating"


@pytest.mark.parametrize("name", NAMES)
def test_a_service_that_never_comes_is_named_and_the_run_can_be_started_again(tmp_path, name):
    with serving() as services:
        addresses = services.addresses | {name: f"127.0.0.1:{free_ports(1)[0]}"}
        config = ppo_config(addresses, 8, 1, 0).model_copy(update={"service_timeout_s": 0.3})
        with (
            pipeline(config, tmp_path) as (rollouts, _),
            pytest.raises(ServiceLostError, match="start the run again") as lost,
        ):
            rollouts.admit(version(0))
            rollouts.take(1)
    assert str(lost.value).startswith(f"the {name} at {addresses[name]} did not answer within 0.3 s")


def test_a_stop_is_heard_while_a_service_is_waited_for(tmp_path):
    config = ppo_config({name: f"127.0.0.1:{port}" for name, port in zip(NAMES, free_ports(3), strict=True)}, 8, 1, 0)
    run = Run("run", "ppo")
    with pipeline(config, tmp_path, run) as (rollouts, _), pytest.raises(StopRun):
        threading.Timer(0.3, run.stop).start()
        rollouts.admit(version(0))


def test_a_generator_that_starts_anew_is_given_the_version_again(tmp_path):
    ports = dict(zip(NAMES, free_ports(3), strict=True))
    config = ppo_config({name: f"127.0.0.1:{port}" for name, port in ports.items()}, 8, 2, 0)
    with pipeline(config, tmp_path) as (rollouts, _):
        with serving(ports=ports):
            rollouts.admit(version(0))
            rollouts.take(1)
        with serving(ports=ports) as again:
            assert again.generator.version.run_id == ""
            rollouts.admit(version(1))
            batch = rollouts.take(2)
            assert {run.version for e in batch.in_order for run in e.completion.versions} == {version(1)}


def test_a_replica_that_refuses_the_version_is_named_with_its_reason_and_delays_no_step(tmp_path):
    with serving() as services, serving(generator=FullDisk) as full:
        refusing = full.addresses["generator"]
        both = f"{refusing},{services.addresses['generator']}"
        config, run = ppo_config(services.addresses | {"generator": both}, 8, 3, 0), Run("run", "ppo")
        config = config.model_copy(update={"service_timeout_s": 5.0})
        with pipeline(config, tmp_path, run) as (rollouts, _):
            for step in range(3):
                rollouts.admit(version(step))
                assert rollouts.take(step + 1).whole
                assert (
                    f"the generator at {refusing} cannot serve {version(step)}: "
                    "RESOURCE_EXHAUSTED: no room for the version" in run.snapshot.activity
                )
        assert full.generator.asked == []

"""Version pins and moves: which calls are served, wait, or are refused."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from grpc import StatusCode

from trimtab.runtime.errors import ServiceError, data_loss
from trimtab.runtime.metrics import Metrics
from trimtab.runtime.model_service import Served, ServedModel
from trimtab_client.v1 import model_pb2
from trimtab_client.versions import ModelVersion


def version(step: int, *, run_id: str = "run", name: str = "policy", digest: str | None = None) -> ModelVersion:
    return ModelVersion(run_id, name, step, f"blake3:{run_id}{step}" if digest is None else digest)


def served(at: ModelVersion) -> Served[str]:
    return Served(at, f"model {at.step}", model_pb2.ModelInfo(version=at.to_proto()))


class Stager:
    def __init__(self) -> None:
        self.staged: list[ModelVersion] = []
        self.broken: set[int] = set()

    async def stage(self, wanted: ModelVersion) -> Served[str]:
        self.staged.append(wanted)
        if wanted.step in self.broken:
            raise data_loss(f"{wanted} is corrupt")
        return served(version(wanted.step, run_id=wanted.run_id, name=wanted.name))


@pytest.fixture
def stager():
    return Stager()


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def moving(stager, metrics):
    return ServedModel(served(version(5)), stage=stager.stage, metrics=metrics)


def exact(**fields) -> model_pb2.VersionPin:
    return model_pb2.VersionPin(exact=model_pb2.ModelVersion(**fields))


def at_least(step: int) -> model_pb2.VersionPin:
    return model_pb2.VersionPin(at_least_step=step)


@pytest.mark.parametrize(
    "pin",
    [
        None,
        model_pb2.VersionPin(),
        at_least(5),
        at_least(0),
        exact(step=5),
        exact(run_id="run"),
        exact(run_id="run", name="policy", step=5, digest="blake3:run5"),
    ],
)
async def test_a_satisfied_pin_is_served_at_once(moving, pin):
    assert (await moving.wait_for(pin, time.monotonic())).version.step == 5


@pytest.mark.parametrize(
    "pin", [at_least(6), exact(run_id="run", name="policy", step=6), exact(run_id="other", step=1)]
)
async def test_a_pin_ahead_waits_for_the_move(moving, pin):
    waiting = asyncio.create_task(moving.wait_for(pin, time.monotonic() + 10))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    wanted = version(1, run_id="other") if pin.exact.run_id == "other" else version(6)
    await moving.move_to(wanted)
    assert (await waiting).version == wanted


async def test_a_pin_that_is_not_reached_is_unavailable_shortly_before_the_deadline(moving):
    started_s = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        await moving.wait_for(at_least(6), started_s + 2)
    assert caught.value.code == StatusCode.UNAVAILABLE
    assert caught.value.retry_after_s is not None
    assert 0.5 < time.monotonic() - started_s < 2


@pytest.mark.parametrize(
    "pin",
    [exact(run_id="run", name="policy", step=4), exact(step=5, digest="blake3:other"), exact(digest="blake3:other")],
)
async def test_a_pin_that_can_never_be_served_is_refused_at_once(moving, pin):
    with pytest.raises(ServiceError) as caught:
        await moving.wait_for(pin, time.monotonic() + 10)
    assert caught.value.code == StatusCode.FAILED_PRECONDITION


async def test_a_waiting_pin_is_refused_once_it_is_passed(moving):
    waiting = asyncio.create_task(moving.wait_for(exact(run_id="run", name="policy", step=6), time.monotonic() + 10))
    await asyncio.sleep(0.01)
    await moving.move_to(version(7))
    with pytest.raises(ServiceError) as caught:
        await waiting
    assert caught.value.code == StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("pin", [at_least(6), exact(run_id="other", step=5)])
async def test_a_server_that_never_moves_refuses_every_other_version(pin):
    fixed = ServedModel(served(version(5)))
    for call in (fixed.wait_for(pin, time.monotonic() + 10), fixed.move_to(version(6))):
        with pytest.raises(ServiceError) as caught:
            await call
        assert caught.value.code == StatusCode.FAILED_PRECONDITION


async def test_moving_to_what_is_served_stages_nothing(moving, stager):
    await moving.move_to(version(5))
    await moving.move_to(version(5, digest=""))
    assert stager.staged == []


async def test_another_digest_than_the_stores_is_refused(moving):
    with pytest.raises(ServiceError) as caught:
        await moving.move_to(version(6, digest="blake3:other"))
    assert caught.value.code == StatusCode.FAILED_PRECONDITION
    assert moving.current.version.step == 5


async def test_a_version_that_fails_is_counted_and_the_old_one_stays_and_the_follower_goes_on(moving, stager, metrics):
    async def pointer() -> AsyncIterator[ModelVersion]:
        for step in (6, 7):
            yield version(step)
            if step == 6:
                assert moving.current.version.step == 5

    stager.broken = {6}
    await moving.follow(pointer())
    assert moving.current.version.step == 7
    value = metrics.registry.get_sample_value
    assert value("trimtab_version_loads_total", {"result": "failed"}) == 1
    assert value("trimtab_version_loads_total", {"result": "ok"}) == 1
    assert value("trimtab_model_step") == 7


async def test_moves_asked_for_at_once_stage_one_after_another(moving, stager):
    await asyncio.gather(*(moving.move_to(version(6)) for _ in range(3)))
    assert len(stager.staged) == 1

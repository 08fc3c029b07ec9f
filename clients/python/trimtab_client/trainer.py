"""TrainerService: starting, watching and controlling training runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from google.protobuf.message import Message

from trimtab_client.calls import Call, ready
from trimtab_client.messages import RunStatus, Sample, StepMetrics
from trimtab_client.models import AsyncClient, Client
from trimtab_client.v1 import trainer_pb2, trainer_pb2_grpc
from trimtab_client.versions import ModelVersion

WATCH_TIMEOUT_S = 30 * 24 * 3600.0
RunEvent = StepMetrics | RunStatus


def start(run_id: str, config: Message) -> Call[RunStatus]:
    """The Start call: the same run_id and config again is harmless. ValueError for another message."""
    kinds: dict[type, str] = {
        trainer_pb2.SftConfig: "sft",
        trainer_pb2.RewardModelConfig: "reward_model",
        trainer_pb2.PpoConfig: "ppo",
    }
    kind = kinds.get(type(config))
    if kind is None:
        raise ValueError(
            f"config: an SftConfig, RewardModelConfig or PpoConfig message is needed, not {type(config).__name__}"
        )
    stage: dict[str, Any] = {kind: config}
    return _control("Start", trainer_pb2.StartRequest(run_id=run_id, **stage), repeatable=True)


def status(run_id: str) -> Call[RunStatus]:
    """The Status call."""
    return _control("Status", trainer_pb2.StatusRequest(run_id=run_id), repeatable=True)


def pause(run_id: str) -> Call[RunStatus]:
    """The Pause call."""
    return _control("Pause", trainer_pb2.PauseRequest(run_id=run_id))


def resume(run_id: str) -> Call[RunStatus]:
    """The Resume call."""
    return _control("Resume", trainer_pb2.ResumeRequest(run_id=run_id))


def stop(run_id: str) -> Call[RunStatus]:
    """The Stop call."""
    return _control("Stop", trainer_pb2.StopRequest(run_id=run_id))


def checkpoint(run_id: str) -> Call[tuple[ModelVersion, ...]]:
    """The Checkpoint call."""

    def parse(answer: trainer_pb2.CheckpointResponse) -> tuple[ModelVersion, ...]:
        return tuple(ModelVersion.from_proto(version) for version in answer.published)

    request = trainer_pb2.CheckpointRequest(run_id=run_id)
    return Call(trainer_pb2_grpc.TrainerServiceStub, "Checkpoint", request, parse, repeatable=False)


def samples(run_id: str, step: int, watched: bool) -> Call[tuple[Sample, ...]]:
    """The Samples call."""

    def parse(answer: trainer_pb2.SamplesResponse) -> tuple[Sample, ...]:
        return tuple(Sample.from_proto(sample) for sample in answer.samples)

    request = trainer_pb2.SamplesRequest(run_id=run_id, step=step, watched=watched)
    return Call(trainer_pb2_grpc.TrainerServiceStub, "Samples", request, parse)


def _control(method: str, request: Any, repeatable: bool = False) -> Call[RunStatus]:
    stub = trainer_pb2_grpc.TrainerServiceStub
    return Call(stub, method, request, lambda answer: RunStatus.from_proto(answer.status), repeatable)


class Watching:
    """A Watch stream. It is asked for again only before its first event: after that the run may be another's."""

    def __init__(self, run_id: str, after_step: int) -> None:
        self._request = trainer_pb2.WatchRequest(run_id=run_id, after_step=after_step)
        self._started = self._ended = False

    def next_call(self) -> Call[RunEvent] | None:
        return None if self._ended else Call(trainer_pb2_grpc.TrainerServiceStub, "Watch", self._request, _event)

    def accept(self, item: RunEvent) -> RunEvent:
        self._started = True
        return item

    def may_resume(self) -> bool:
        return not self._started

    def ended(self) -> None:
        self._ended = True


def _event(answer: trainer_pb2.WatchResponse) -> RunEvent:
    if answer.WhichOneof("event") == "metrics":
        return StepMetrics.from_proto(answer.metrics)
    return RunStatus.from_proto(answer.status)


class TrainerClient(Client):
    """Starts, watches and controls training runs; `run_id` "" is the newest."""

    def start(self, run_id: str, config: Message, timeout_s: float | None = None) -> RunStatus:
        """Begin a run with an SftConfig, RewardModelConfig or PpoConfig message; again is harmless."""
        return self._transport.unary(start(run_id, config), timeout_s)

    def status(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Where the run is."""
        return self._transport.unary(status(run_id), timeout_s)

    def watch(self, run_id: str = "", after_step: int = 0, timeout_s: float = WATCH_TIMEOUT_S) -> Iterator[RunEvent]:
        """Yield the metrics of each step after `after_step` and each change of status, until the run ends."""
        return self._transport.streams(ready([Watching(run_id, after_step)]), timeout_s)

    def pause(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Hold after the current step."""
        return self._transport.unary(pause(run_id), timeout_s)

    def resume(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Go on."""
        return self._transport.unary(resume(run_id), timeout_s)

    def checkpoint(self, run_id: str = "", timeout_s: float | None = None) -> tuple[ModelVersion, ...]:
        """Publish the weights after the current step; returns the versions.

        `timeout_s` has to cover what is left of that step: a call that gives up before its end publishes nothing.
        """
        return self._transport.unary(checkpoint(run_id), timeout_s)

    def stop(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """End after the current step; what was published stays."""
        return self._transport.unary(stop(run_id), timeout_s)

    def samples(
        self, run_id: str = "", step: int = 0, watched: bool = False, timeout_s: float | None = None
    ) -> tuple[Sample, ...]:
        """Samples of a step of PPO (0: the newest), or with `watched` the newest to each prompt of step 1."""
        return self._transport.unary(samples(run_id, step, watched), timeout_s)


class AsyncTrainerClient(AsyncClient):
    """Starts, watches and controls training runs; `run_id` "" is the newest."""

    async def start(self, run_id: str, config: Message, timeout_s: float | None = None) -> RunStatus:
        """Begin a run with an SftConfig, RewardModelConfig or PpoConfig message; again is harmless."""
        return await self._transport.unary(start(run_id, config), timeout_s)

    async def status(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Where the run is."""
        return await self._transport.unary(status(run_id), timeout_s)

    def watch(
        self, run_id: str = "", after_step: int = 0, timeout_s: float = WATCH_TIMEOUT_S
    ) -> AsyncIterator[RunEvent]:
        """Yield the metrics of each step after `after_step` and each change of status, until the run ends."""
        return self._transport.streams(ready([Watching(run_id, after_step)]), timeout_s)

    async def pause(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Hold after the current step."""
        return await self._transport.unary(pause(run_id), timeout_s)

    async def resume(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """Go on."""
        return await self._transport.unary(resume(run_id), timeout_s)

    async def checkpoint(self, run_id: str = "", timeout_s: float | None = None) -> tuple[ModelVersion, ...]:
        """Publish the weights after the current step; returns the versions.

        `timeout_s` has to cover what is left of that step: a call that gives up before its end publishes nothing.
        """
        return await self._transport.unary(checkpoint(run_id), timeout_s)

    async def stop(self, run_id: str = "", timeout_s: float | None = None) -> RunStatus:
        """End after the current step; what was published stays."""
        return await self._transport.unary(stop(run_id), timeout_s)

    async def samples(
        self, run_id: str = "", step: int = 0, watched: bool = False, timeout_s: float | None = None
    ) -> tuple[Sample, ...]:
        """Samples of a step of PPO (0: the newest), or with `watched` the newest to each prompt of step 1."""
        return await self._transport.unary(samples(run_id, step, watched), timeout_s)

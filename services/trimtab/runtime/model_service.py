"""The version a server serves: pins, hot swap, the followed pointer, and `trimtab.v1.ModelService` over them.

A room stages versions with a coroutine of its own; this module decides when, keeps the old version served until the
new one is whole, and makes pinned calls wait. It reads no store and no weights.
"""

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
import grpc.aio

from trimtab.runtime.calls import deadline_of
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import as_service_error, internal, invalid, precondition, unavailable
from trimtab.runtime.logs import get_logger
from trimtab.runtime.metrics import Metrics
from trimtab.runtime.server import Service
from trimtab_client.v1 import model_pb2, model_pb2_grpc
from trimtab_client.versions import ModelVersion

log = get_logger(__name__)

Model = TypeVar("Model")

SERVICE_NAME = "trimtab.v1.ModelService"
# A pinned call without a deadline waits this long; one with a deadline stops short of it, so that the answer arrives.
LONGEST_WAIT_S = 60.0
ANSWER_SHARE, LEAST_ANSWER_S, MOST_ANSWER_S = 0.1, 0.2, 2.0


@dataclass(frozen=True)
class Served(Generic[Model]):
    """A model and the version it is; a call keeps the one it began with, whatever is swapped in meanwhile."""

    version: ModelVersion
    model: Model
    info: model_pb2.ModelInfo


class DescribedModel(Protocol):
    """What `describe` reads of a policy or a scalar model."""

    tokenizer: Any
    tokenizer_digest: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    @property
    def dtype(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def parameter_count(self) -> int: ...


def describe(
    model: DescribedModel, version: ModelVersion, *, max_length: int, limits: RequestLimits
) -> model_pb2.ModelInfo:
    """What GetModel answers while `model` is served; `max_length` in tokens, prompt and response together."""
    return model_pb2.ModelInfo(
        version=version.to_proto(),
        tokenizer_digest=model.tokenizer_digest,
        vocab_size=model.vocab_size,
        max_length=max_length,
        dtype=model.dtype,
        architecture=model.architecture,
        parameter_count=model.parameter_count,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=bool(model.tokenizer.chat_template),
        max_sequences=limits.max_sequences,
        max_tokens=limits.max_tokens,
    )


Stage = Callable[[ModelVersion], Awaitable[Served[Model]]]


class ServedModel(Generic[Model]):
    """Holds the `Served` of now and moves to others by `stage`; without `stage` it never moves.

    `stage(version)` makes a version servable (fetch, verify, load off the event loop) and returns it, or raises;
    then the old one goes on being served.
    """

    def __init__(
        self, served: Served[Model], *, stage: Stage[Model] | None = None, metrics: Metrics | None = None
    ) -> None:
        self._served = served
        self._stage = stage
        self._metrics = metrics
        self._moving = asyncio.Lock()
        self._moved = asyncio.Condition()
        self._report()

    @property
    def current(self) -> Served[Model]:
        return self._served

    @property
    def can_move(self) -> bool:
        return self._stage is not None

    async def move_to(self, version: ModelVersion) -> Served[Model]:
        """Stage `version` and swap to it; at once where it is served already. One move at a time, in order.

        FAILED_PRECONDITION where this server never moves or the digest is another; else what `stage` raised.
        """
        if self._stage is None:
            raise precondition(f"this server serves {self._served.version} and never moves to another version")
        async with self._moving:
            if _is(version, self._served.version):
                return self._served
            started_s = time.monotonic()
            try:
                served = await self._stage(version)
                if version.digest and served.version.digest != version.digest:
                    raise precondition(
                        f"{version} has digest {served.version.digest} in the store, not {version.digest}",
                        field="version.digest",
                    )
            except Exception as error:
                self._count("failed")
                log.error("version refused", version=str(version), reason=str(error), serving=str(self._served.version))
                raise
            async with self._moved:
                self._served = served
                self._moved.notify_all()
            self._count("ok")
            self._report()
            log.info("version served", version=str(served.version), seconds=round(time.monotonic() - started_s, 3))
            return served

    async def follow(self, versions: AsyncIterable[ModelVersion]) -> None:
        """Move to each version that comes; one that fails is logged and counted, and the old one goes on."""
        async for version in versions:
            try:
                await self.move_to(version)
            except Exception as error:
                if as_service_error(error) is None:
                    log.error("version failed to load", version=str(version), exc_info=error)

    async def wait_for(self, pin: model_pb2.VersionPin | None, deadline: float | None = None) -> Served[Model]:
        """The served model that satisfies the pin; None or an empty pin is satisfied by any.

        Waits until shortly before `deadline` (`time.monotonic()` seconds), then UNAVAILABLE with RetryInfo.
        FAILED_PRECONDITION at once where this server can never serve it.
        """
        if pin is None or pin.WhichOneof("rule") is None:
            return self._served
        until = time.monotonic() + LONGEST_WAIT_S if deadline is None else _answer_by(deadline)
        async with self._moved:
            while not self._satisfies(pin):
                timeout_s = until - time.monotonic()
                try:
                    await asyncio.wait_for(self._moved.wait(), max(timeout_s, 0.0))
                except TimeoutError:
                    raise unavailable(f"{_wanted(pin)} is not served here yet, but {self._served.version}") from None
            return self._served

    def _satisfies(self, pin: model_pb2.VersionPin) -> bool:
        """Whether the version of now does; FAILED_PRECONDITION where none of this server ever will."""
        now = self._served.version
        if pin.WhichOneof("rule") == "at_least_step":
            if now.step >= pin.at_least_step:
                return True
        else:
            exact = ModelVersion.from_proto(pin.exact)
            if matches(exact, now):
                return True
            same_line = exact.run_id in ("", now.run_id) and exact.name in ("", now.name)
            if same_line and exact.step and exact.step < now.step:
                raise precondition(f"{exact} is older than {now}, which this server serves", field="version.exact")
            if same_line and exact.step in (0, now.step) and exact.digest:
                raise precondition(f"{now} has another digest than {exact.digest}", field="version.exact.digest")
        if not self.can_move:
            raise precondition(f"{_wanted(pin)}: this server serves {now} and never moves", field="version")
        return False

    def _count(self, result: str) -> None:
        if self._metrics is not None:
            self._metrics.version_loads.labels(result).inc()

    def _report(self) -> None:
        if self._metrics is not None:
            self._metrics.model_step.set(self._served.version.step)


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """GetModel and LoadVersion of one `ServedModel`."""

    def __init__(self, served: ServedModel[Model]) -> None:
        self._served: ServedModel = served

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=self._served.current.info)

    async def LoadVersion(
        self, request: model_pb2.LoadVersionRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.LoadVersionResponse:
        return model_pb2.LoadVersionResponse(model=(await load_version(self._served, request)).info)

    def as_service(self) -> Service:
        return Service(SERVICE_NAME, model_pb2_grpc.add_ModelServiceServicer_to_server, self)


async def load_version(served: ServedModel[Model], request: model_pb2.LoadVersionRequest) -> Served[Model]:
    """Move to the version of a request. A caller that gives up does not stop a swap that others wait for."""
    version = ModelVersion.from_proto(request.version)
    if served.can_move:
        for field in ("run_id", "name"):
            if not getattr(version, field):
                raise invalid(f"version.{field}", "required: a published version has run_id, name and step")
    try:
        return await asyncio.shield(served.move_to(version))
    except Exception as error:
        refusal = as_service_error(error) or internal(f"{version} failed to load: {error}")
        if refusal.code == grpc.StatusCode.INVALID_ARGUMENT and refusal.field is None:
            refusal.field = "version"
        raise refusal from error


async def pinned(
    served: ServedModel[Model], request_pin: model_pb2.VersionPin | None, context: grpc.aio.ServicerContext
) -> Served[Model]:
    """`wait_for` with the call's own deadline."""
    return await served.wait_for(request_pin, deadline_of(context))


def _answer_by(deadline: float) -> float:
    """When a call that waits gives up: a tenth of its time is kept for the answer, 0.2 to 2 s, for busy machines."""
    left_s = deadline - time.monotonic()
    return deadline - min(max(ANSWER_SHARE * left_s, LEAST_ANSWER_S), MOST_ANSWER_S)


def _is(wanted: ModelVersion, now: ModelVersion) -> bool:
    same = (wanted.run_id, wanted.name, wanted.step) == (now.run_id, now.name, now.step)
    return same and wanted.digest in ("", now.digest)


def matches(exact: ModelVersion, now: ModelVersion) -> bool:
    """Empty fields of an exact pin (step 0 is one) match anything."""
    return (
        exact.run_id in ("", now.run_id)
        and exact.name in ("", now.name)
        and exact.step in (0, now.step)
        and exact.digest in ("", now.digest)
    )


def _wanted(pin: model_pb2.VersionPin) -> str:
    if pin.WhichOneof("rule") == "at_least_step":
        return f"step {pin.at_least_step} or later"
    return str(ModelVersion.from_proto(pin.exact))

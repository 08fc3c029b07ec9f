"""The trainer service: one run at a time on a thread of its own, controlled and watched over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from trimtab.kernels.selfcheck import KernelMismatchError, check_training_kernels
from trimtab.runtime.errors import ServiceError, StartError, invalid, not_found, precondition
from trimtab.runtime.logs import get_logger
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab.trainer.adapters import check_adapters
from trimtab.trainer.config import DEFAULT_STORE, TrainerConfig
from trimtab.trainer.context import StageContext
from trimtab.trainer.durable import held
from trimtab.trainer.metric_sinks import METRIC
from trimtab.trainer.past_runs import past_run, past_run_ids
from trimtab.trainer.ranks import ALONE, Ranks, RanksApartError, end_with_launcher, follows
from trimtab.trainer.run import Run, RunFailedError, RunSnapshot, RunState, StepMetrics, StopRun
from trimtab.trainer.run_record import OtherConfigError, RunFolder, RunRecord
from trimtab.trainer.sample_wire import read_samples
from trimtab.trainer.stages import Stage, StageConfigError, stage_from_proto
from trimtab.trainer.work import STAGE_NAMES, Task, dismiss, follow, lead, part, stage_context
from trimtab.weights.layout import check_name
from trimtab.weights.store import Store, open_store
from trimtab_client.v1 import trainer_pb2, trainer_pb2_grpc

log = get_logger(__name__)

LABEL = "trainer"
SERVICE_NAME = "trimtab.v1.TrainerService"
SERVICES = (SERVICE_NAME,)
LISTED_RUNS = 20
"""Most names of runs in the answer to a wrong one."""


def main(config: TrainerConfig) -> int:
    """Serve until SIGTERM, or follow the rank that does; returns the exit code."""
    end_with_launcher()
    if follows():
        return follow(config, Ranks.join(config.device))
    return serve(LABEL, config, services=SERVICES, load=load)


async def load(context: ServerContext) -> Sequence[Service]:
    """Check the kernels, open the store, and give the service. Raises StartError for kernels that compute wrongly."""
    config = context.config
    assert isinstance(config, TrainerConfig)
    try:
        await asyncio.to_thread(check_training_kernels, config.device)
    except KernelMismatchError as error:
        raise StartError(str(error)) from error
    ranks = await asyncio.to_thread(Ranks.join, config.device)
    servicer = TrainerServicer(config, open_store(config.store or DEFAULT_STORE), context.draining, ranks)
    context.metrics.registry.register(METRIC)
    context.on_close(servicer.close)
    return [Service(SERVICE_NAME, trainer_pb2_grpc.add_TrainerServiceServicer_to_server, servicer)]


class TrainerServicer(trainer_pb2_grpc.TrainerServiceServicer):
    """Runs stages one after another; keeps every run of this process, newest last. Earlier ones can be looked at."""

    def __init__(self, config: TrainerConfig, store: Store, draining: asyncio.Event, ranks: Ranks = ALONE) -> None:
        self._config = config
        self._ranks = ranks
        self._store = store
        self._draining = draining
        self._runs: dict[str, Run] = {}
        self._records: dict[str, RunRecord] = {}
        self._starting = asyncio.Lock()
        self._thread: threading.Thread | None = None

    async def Start(
        self, request: trainer_pb2.StartRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.StartResponse:
        kind = request.WhichOneof("config")
        if kind is None:
            raise invalid("config", "give sft, reward_model or ppo")
        check_run_id(request.run_id)
        try:
            stage = stage_from_proto(kind, getattr(request, kind))
            check_adapters(stage, self._ranks)
        except StageConfigError as error:
            raise invalid(f"{kind}.{error.field}", error.reason) from error
        async with self._starting:
            run = await asyncio.to_thread(self._known, request.run_id, kind, stage) or self._begin(
                request.run_id, kind, stage
            )
        return trainer_pb2.StartResponse(status=status_proto(run.snapshot))

    async def Status(
        self, request: trainer_pb2.StatusRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.StatusResponse:
        return trainer_pb2.StatusResponse(status=status_proto((await self._find(request.run_id)).snapshot))

    async def Watch(
        self, request: trainer_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[trainer_pb2.WatchResponse]:
        run = await self._find(request.run_id)
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(changed.set)

        forget = run.listen(tell)
        position, told = 0, None
        try:
            while not self._draining.is_set():
                changed.clear()
                snapshot = run.snapshot
                events = run.events_after(position)
                position += len(events)
                for event in events:
                    if event.step > request.after_step:
                        yield trainer_pb2.WatchResponse(metrics=metrics_proto(snapshot, event))
                state = (snapshot.state, snapshot.activity, len(snapshot.published))
                if state != told:
                    told = state
                    yield trainer_pb2.WatchResponse(status=status_proto(snapshot))
                if snapshot.state.finished:
                    return
                await _first_set(changed, self._draining)
        finally:
            forget()

    async def Pause(
        self, request: trainer_pb2.PauseRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.PauseResponse:
        run = await self._find_going(request.run_id)
        run.pause()
        return trainer_pb2.PauseResponse(status=status_proto(run.snapshot))

    async def Resume(
        self, request: trainer_pb2.ResumeRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.ResumeResponse:
        run = await self._find_going(request.run_id)
        run.resume()
        return trainer_pb2.ResumeResponse(status=status_proto(run.snapshot))

    async def Checkpoint(
        self, request: trainer_pb2.CheckpointRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.CheckpointResponse:
        request_future: Future = (await self._find_going(request.run_id)).checkpoint()
        try:
            versions = await asyncio.wrap_future(request_future)
        except RunFailedError as error:
            raise precondition(str(error)) from error
        return trainer_pb2.CheckpointResponse(published=[version.to_proto() for version in versions])

    async def Stop(
        self, request: trainer_pb2.StopRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.StopResponse:
        run = await self._find(request.run_id)
        run.stop()
        return trainer_pb2.StopResponse(status=status_proto(run.snapshot))

    async def Samples(
        self, request: trainer_pb2.SamplesRequest, context: grpc.aio.ServicerContext
    ) -> trainer_pb2.SamplesResponse:
        run_id = (await self._find(request.run_id)).snapshot.run_id
        samples = await asyncio.to_thread(
            read_samples, self._config.folder / run_id, request.step, watched=request.watched
        )
        return trainer_pb2.SamplesResponse(samples=samples)

    async def close(self) -> None:
        """Stop the run that is going and wait for its current step."""
        for run in self._runs.values():
            run.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(dismiss, self._ranks)

    def _known(self, run_id: str, kind: str, stage: Stage) -> Run | None:
        """The run of that name that is going or has succeeded, here or before this process; None if it has to start.

        ALREADY_EXISTS where it has another config.
        """
        folder = RunFolder(self._config.folder / run_id)
        run = self._runs.get(run_id)
        if (run is None or run.snapshot.state is RunState.FAILED) and folder.is_empty and folder.discard():
            return None  # none yet, or it failed before its first step: a wrong path, say
        try:
            record = self._records.get(run_id) or folder.record()
            if record is not None:
                record.check_same(run_id, kind, stage)
        except OtherConfigError as error:
            raise ServiceError(grpc.StatusCode.ALREADY_EXISTS, str(error), field=error.field) from error
        except ValueError as error:
            raise precondition(f"{folder.folder} cannot be read ({error}); take another run id") from error
        if run is not None and (not run.snapshot.state.finished or run.snapshot.state is RunState.SUCCEEDED):
            return run
        if record is None or folder.outcome() != "succeeded":
            return None
        found = past_run(run_id, self._config.folder / run_id, self._store)
        if found is None:  # never run again what has succeeded
            raise precondition(f"{folder.folder} cannot be read; see its files, or take another run id")
        self._runs[run_id] = found
        return found

    def _begin(self, run_id: str, kind: str, stage: Stage) -> Run:
        """Start a thread that runs the stage. FAILED_PRECONDITION while another run is going."""
        for other, run in self._runs.items():
            if not run.snapshot.state.finished:
                raise precondition(f"run {other} is still going; one run at a time: wait for it or stop it")
        run = Run(run_id, STAGE_NAMES[kind])
        self._runs.pop(run_id, None)  # the newest comes last
        self._runs[run_id], self._records[run_id] = run, RunRecord(kind, stage)
        work = (run, kind, stage, self._thread)
        self._thread = threading.Thread(target=self._work, args=work, name=f"run-{run_id}")
        self._thread.start()
        return run

    async def _find(self, run_id: str) -> Run:
        """The run of that name, the newest for ""; of this process or, to be looked at, of before it."""
        if run_id in self._runs:
            return self._runs[run_id]
        if not run_id and self._runs:
            return next(reversed(self._runs.values()))
        return await asyncio.to_thread(self._find_past, run_id)

    def _find_past(self, run_id: str) -> Run:
        if run_id:
            check_run_id(run_id)
        folder = self._config.folder
        known = past_run_ids(folder)
        for name in [run_id] if run_id else known:
            if (run := past_run(name, folder / name, self._store)) is not None:
                return run
        if not run_id:
            raise not_found("no run was started here", field="run_id")
        there = list(dict.fromkeys([*reversed(self._runs), *known]))[:LISTED_RUNS]
        raise not_found(f"no run {run_id} here; there are {', '.join(there) or 'none'}", field="run_id")

    async def _find_going(self, run_id: str) -> Run:
        run = await self._find(run_id)
        if run.snapshot.state.finished:
            raise precondition(f"run {run.snapshot.run_id} has ended ({run.snapshot.state.name.lower()})")
        return run

    def _work(self, run: Run, kind: str, stage: Stage, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        run_id = run.snapshot.run_id
        log.info("run started", run_id=run_id, stage=kind)
        state, error = RunState.SUCCEEDED, ""
        try:
            with self._held(run, kind, stage) as context:
                try:
                    lead(Task(run_id, kind, stage), context)
                except StopRun:
                    state = RunState.STOPPED
                context.end(state)
        except RanksApartError as failure:
            part(self._ranks, failure)  # not the end of the run: it goes on once all ranks are back
        except Exception as failure:
            log.error("run failed", run_id=run_id, stage=kind, exc_info=failure)
            state, error = RunState.FAILED, str(failure) or type(failure).__name__
        run.finish(state, error)
        log.info("run ended", run_id=run_id, state=run.snapshot.state.name)

    @contextmanager
    def _held(self, run: Run, kind: str, stage: Stage) -> Iterator[StageContext]:
        """The run's folder and its lease, for this trainer alone. Raises RunLockedError, LeaseHeldError."""
        config, run_id = self._config, run.snapshot.run_id
        folder = config.folder / run_id
        with held(RunFolder(folder).lock):
            owner, ttl_s = RunFolder(folder).begin(kind, stage).owner, config.lease_ttl_s
            run.doing("taking the run's lease")
            with self._store.acquire_lease(run_id, owner, ttl_s, wait_s=1.1 * ttl_s).kept_alive() as lease:
                yield stage_context(config, self._store, run, lease, self._ranks)


def check_run_id(run_id: str) -> None:
    """INVALID_ARGUMENT unless the id can name a folder of the store."""
    try:
        check_name("run_id", run_id)
    except Exception as error:
        raise invalid("run_id", str(error)) from error


def status_proto(snapshot: RunSnapshot) -> trainer_pb2.RunStatus:
    """A run's status as it travels."""
    status = trainer_pb2.RunStatus(
        run_id=snapshot.run_id,
        stage=snapshot.stage,
        state=trainer_pb2.RunState.ValueType(snapshot.state.value),
        step=snapshot.step,
        total_steps=snapshot.total_steps,
        activity=snapshot.activity,
        error=snapshot.error,
        published=[version.to_proto() for version in snapshot.published],
    )
    status.started_at.FromDatetime(snapshot.started_at)
    if snapshot.finished_at is not None:
        status.finished_at.FromDatetime(snapshot.finished_at)
    return status


def metrics_proto(snapshot: RunSnapshot, event: StepMetrics) -> trainer_pb2.StepMetrics:
    """A step's metrics as they travel."""
    time = Timestamp()
    time.FromDatetime(event.time)
    return trainer_pb2.StepMetrics(
        run_id=snapshot.run_id,
        stage=snapshot.stage,
        step=event.step,
        total_steps=event.total_steps,
        values=event.values,
        time=time,
    )


async def _first_set(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()

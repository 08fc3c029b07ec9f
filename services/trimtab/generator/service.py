"""GeneratorService over one engine: prompts in, each completion out as it finishes, versions followed while serving.

It checks and translates (requests.py), queues (driver.py) and swaps (loading.py, then the engine); sampling itself is
the engine's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import grpc.aio
from prometheus_client import CollectorRegistry, Gauge

from trimtab.generator.config import GeneratorConfig
from trimtab.generator.driver import EngineDriver
from trimtab.generator.engine import FailedSequence, FailureReason, FinishedSequence, FinishReason, SequenceRequest
from trimtab.generator.engines import make_engine
from trimtab.generator.loading import let_go, load_policy, max_length_of, model_info, stage_weights
from trimtab.generator.requests import Bounds, Origin, parse_request
from trimtab.models.policy import Policy
from trimtab.runtime import model_service, tracing
from trimtab.runtime.calls import deadline_of
from trimtab.runtime.errors import ServiceError, StartError, deadline_exceeded, internal, precondition, unavailable
from trimtab.runtime.metrics import Metrics
from trimtab.runtime.model_service import ModelServicer, Served, ServedModel, pinned
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import parse_reference
from trimtab.weights.store import Store, open_store
from trimtab.weights.watch import PointerWatcher
from trimtab_client.v1 import generator_pb2, generator_pb2_grpc
from trimtab_client.versions import ModelVersion

LABEL = "generator"
SERVICE_NAME = "trimtab.v1.GeneratorService"
SERVICES = (SERVICE_NAME, model_service.SERVICE_NAME)

FINISH_REASONS = {
    FinishReason.STOP: generator_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generator_pb2.FINISH_REASON_LENGTH,
}


def main(config: GeneratorConfig) -> int:
    """Serve until SIGTERM; the process's exit code."""
    return serve(LABEL, config, services=SERVICES, load=load)


async def load(context: ServerContext) -> Sequence[Service]:
    """Load the policy, start the engine's driver and the follower; what `RunningServer` serves.

    Raises StartError where the model or the store cannot be used.
    """
    config = context.config
    assert isinstance(config, GeneratorConfig)
    try:
        store = open_store(config.store) if config.store is not None else None
        followed = parse_reference(config.follow) if config.follow is not None else None
    except StoreError as error:
        raise StartError(str(error)) from error
    loaded = await context.worker.run(load_policy, config, store)
    policy, max_length = loaded.policy, max_length_of(config, loaded.policy)
    engine = await make_engine(context, config, loaded, max_length)
    driver = EngineDriver(engine, context.worker, context.metrics, queue_limit=config.queue_limit)
    swapper = Swapper(config, policy, store, driver, context.metrics) if store is not None else None
    served = ServedModel(
        Served(loaded.version, policy, model_info(config, policy, loaded.version)),
        stage=swapper.stage if swapper is not None else None,
        metrics=context.metrics,
    )
    context.background(driver.run(), name="generator-driver")
    if store is not None and followed is not None:
        watcher = PointerWatcher(store, followed.run_id, followed.name, config.poll_interval_s, seen=loaded.version)
        context.background(served.follow(_versions(watcher)), name="generator-follow")
    bounds = Bounds(config.limits, max_length, config.default_max_tokens)
    servicer = GeneratorServicer(served, driver, bounds)
    add = generator_pb2_grpc.add_GeneratorServiceServicer_to_server
    return [Service(SERVICE_NAME, add, servicer), ModelServicer(served).as_service()]


def swap_pause(registry: CollectorRegistry) -> Gauge:
    """Seconds."""
    name, told = "trimtab_swap_pause_seconds", "The longest that sampling waited at a time for the newest version."
    return Gauge(name, told, registry=registry)


class Swapper:
    """Stages a version beside the running engine and asks the engine to swap to it."""

    def __init__(
        self, config: GeneratorConfig, policy: Policy, store: Store, driver: EngineDriver, metrics: Metrics
    ) -> None:
        self._config = config
        self._policy = policy
        self._store = store
        self._driver = driver
        self._pause = swap_pause(metrics.registry)

    async def stage(self, version: ModelVersion) -> Served[Policy]:
        """Return once the engine samples with `version`; raises ServiceError, the old version then stays."""
        engine = self._driver.engine
        served = engine.version if engine.takes_patches else None
        staged = await asyncio.to_thread(stage_weights, self._store, version, self._policy, served)
        swapping = engine.swap(staged, self._config.swap_mode)
        self._driver.wake()
        try:
            now = await asyncio.wrap_future(swapping)
        except ValueError as error:
            raise precondition(f"{version}: {error}") from error
        self._pause.set(engine.pause_s)
        await asyncio.to_thread(let_go, staged)
        return Served(now, self._policy, model_info(self._config, self._policy, now))


class GeneratorServicer(generator_pb2_grpc.GeneratorServiceServicer):
    """trimtab.v1.GeneratorService."""

    def __init__(self, served: ServedModel[Policy], driver: EngineDriver, bounds: Bounds) -> None:
        self._served = served
        self._driver = driver
        self._bounds = bounds

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        """Stream each completion as it finishes; a call that ends early frees its slots."""
        parsed = await asyncio.to_thread(
            parse_request,
            request,
            self._served.current.model,
            self._bounds,
            next_id=self._driver.next_id,
            deadline_s=deadline_of(context),
        )
        await pinned(self._served, request.version if request.HasField("version") else None, context)
        known = {
            sequence.sequence_id: (sequence, origin)
            for sequence, origin in zip(parsed.requests, parsed.origins, strict=True)
        }
        ticket = self._driver.submit(parsed.requests)
        submitted_ns = time.time_ns()
        try:
            async for outcome in ticket.outcomes():
                if isinstance(outcome, FailedSequence):
                    raise _failure(outcome)
                sequence, origin = known[outcome.sequence_id]
                seen = {"trimtab.seed": str(sequence.seed), "trimtab.tokens": len(outcome.token_ids)}
                tracing.mark("generator", "completion", seen, submitted_ns)
                yield generator_pb2.GenerateResponse(completion=_completion(outcome, sequence, origin))
        finally:
            ticket.close()


async def _versions(watcher: PointerWatcher) -> AsyncIterator[ModelVersion]:
    async for manifest in watcher:
        yield manifest.version


def _failure(outcome: FailedSequence) -> ServiceError:
    match outcome.reason:
        case FailureReason.EXPIRED:
            return deadline_exceeded(outcome.message)
        case FailureReason.VERSION:
            return unavailable(outcome.message, retry_after_s=0.1)
        case FailureReason.BROKEN:
            return internal(outcome.message)
        case FailureReason.LOST:
            return unavailable(outcome.message, retry_after_s=1.0)


def _completion(finished: FinishedSequence, sequence: SequenceRequest, origin: Origin) -> generator_pb2.Completion:
    return generator_pb2.Completion(
        prompt_index=origin.prompt_index,
        sample_index=origin.sample_index,
        prompt_token_ids=sequence.prompt_ids.astype("<i4").tobytes(),
        token_ids=finished.token_ids.astype("<i4").tobytes(),
        logprobs=finished.logprobs.astype("<f4").tobytes(),
        text=finished.text,
        finish_reason=FINISH_REASONS[finished.finish_reason],
        versions=[
            generator_pb2.VersionRun(version=run.version.to_proto(), token_count=run.token_count)
            for run in finished.runs
        ],
        seed=sequence.seed,
    )

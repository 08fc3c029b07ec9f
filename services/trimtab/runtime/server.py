"""Bootstrap of one gRPC server process: listen, load, serve, drain.

The port opens at once: while the model loads, health says NOT_SERVING and calls get UNAVAILABLE. `run_service` is the
whole life of a process with signals; `RunningServer` the same server inside a running loop. What a room serves comes
from its `load` coroutine; this module knows no model.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from trimtab.runtime import health, tracing
from trimtab.runtime.audit import AuditLog
from trimtab.runtime.auth import Authenticator
from trimtab.runtime.calls import CallInterceptor
from trimtab.runtime.config import ServiceConfig, is_loopback
from trimtab.runtime.device_worker import DeviceWorker
from trimtab.runtime.errors import StartError, as_service_error
from trimtab.runtime.logs import configure_logs, get_logger
from trimtab.runtime.metrics import Metrics, MetricsServer
from trimtab.runtime.probes import EventLoopBeat, ProbeServer
from trimtab.runtime.tls import server_credentials

log = get_logger(__name__)

# How long a drained server waits for its device thread, and then the process for its other threads, before it leaves.
CLOSE_PATIENCE_S = 1.0
EXIT_PATIENCE_S = 2.0


@dataclass(frozen=True)
class Service:
    """One gRPC service: its full name, the generated `add_…_to_server` and the servicer."""

    name: str
    add: Callable[[Any, grpc.aio.Server], None]
    servicer: object


class ServerContext:
    """What a room's `load` gets: the config, the worker thread, the metrics, and a place for its background tasks.

    `draining` is set when the server begins to drain: open-ended streams end then. A room's loops are given to
    `background`, what must be closed at the end to `on_close` (called in reverse order, after the last call ended).
    """

    def __init__(self, label: str, config: ServiceConfig, authenticator: Authenticator) -> None:
        self.label = label
        self.config = config
        self.authenticator = authenticator
        self.metrics = Metrics()
        self.worker = DeviceWorker(f"{label}-device", threads=config.threads)
        self._others: list[DeviceWorker] = []
        self._worker_given = False
        self.draining = asyncio.Event()
        self.failed = asyncio.Event()
        self.ports: dict[str, int] = {}  # a room's own, beside the gRPC port; the ready file names them
        self._tasks: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], Awaitable[None]]] = []

    def background(self, coroutine: Coroutine[Any, Any, None], *, name: str) -> None:
        """Run beside the calls until the server drains; a task that fails is logged."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def new_worker(self, name: str) -> DeviceWorker:
        """A thread for one of several models: `worker` for the first, so that none waits for another's forward."""
        if not self._worker_given:
            self._worker_given = True
            return self.worker
        self._others.append(DeviceWorker(f"{self.label}-{name}", threads=self.config.threads))
        return self._others[-1]

    def stalled_s(self) -> float:
        """Seconds without progress of the worker that has had none for longest. Any thread."""
        return max(worker.stalled_s() for worker in (self.worker, *self._others))

    def fail(self, reason: str) -> None:
        """Say that nothing can be served any more: the process drains and ends with 1, for another to be started."""
        log.error(f"cannot serve {self.label} any more: {reason}")
        self.failed.set()

    def on_close(self, closer: Callable[[], Awaitable[None]]) -> None:
        self._closers.append(closer)

    async def stop_background(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        for closer in reversed(self._closers):
            await closer()
        for worker in (self.worker, *self._others):
            await asyncio.to_thread(worker.close)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", task=task.get_name(), exc_info=error)


Load = Callable[[ServerContext], Awaitable[Sequence[Service]]]


class RunningServer:
    """`async with RunningServer("reward", config, services=names, load=load) as server: server.address`.

    Entering starts to listen and waits until the room is loaded and SERVING (with `wait_loaded=False` only until it
    listens; then await `loaded()`); leaving drains. Raises StartError (port in use, bad certificate) or what
    `load` raised.
    """

    def __init__(
        self, label: str, config: ServiceConfig, *, services: Sequence[str], load: Load, wait_loaded: bool = True
    ) -> None:
        self.config = config
        self.port = 0
        self.health_port: int | None = None
        self.metrics_port: int | None = None
        self._label = label
        self._names = tuple(services)
        self._load = load
        self._wait_loaded = wait_loaded
        self._drained = False

    @property
    def address(self) -> str:
        """host:port as a client on this machine dials it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}.get(self.config.host, self.config.host)
        return f"{host}:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        if self._wait_loaded:
            try:
                await self.loaded()
            except BaseException:
                await self.drain(grace_s=0)
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drain()

    async def start(self) -> None:
        """Listen with health NOT_SERVING and begin to load."""
        config = self.config
        if config.auth.is_open and not config.insecure and not is_loopback(config.host):
            raise StartError(
                f"auth: {config.host} is reachable from other machines and everybody may call; set auth.keys_file, "
                "auth.jwt or auth.certificates, or insecure: true"
            )
        credentials = server_credentials(config)
        self._authenticator, audit = Authenticator(config.auth), AuditLog(config.auth.audit_file)
        self.context = ServerContext(self._label, config, self._authenticator)
        tracing.start(self._label, config.otlp_endpoint)
        self._calls = CallInterceptor(self.context.metrics, config.limits, self._authenticator, audit, self._label)
        self._health = health.Health(self._names)
        await self._health.set_serving(False)
        self._server = grpc.aio.server(interceptors=[self._calls], options=_options(config))
        self._beat = EventLoopBeat()
        self._probes: ProbeServer | None = None
        self._health.add_to(self._server)
        reflection.enable_server_reflection((*self._names, health.SERVICE, reflection.SERVICE_NAME), self._server)
        self.port = _bind(self._server, "port", config.host, config.port, credentials)
        if config.health_port is not None:
            target = _target(config.host, config.health_port)
            self._probes = ProbeServer(target, self._names, stalled_s=self._stalled_s, liveness_s=config.liveness_s)
            self.health_port = self._probes.port
        self._metrics_server: MetricsServer | None = None
        if config.metrics_port is not None:
            self._metrics_server = MetricsServer.start(self.context.metrics, config.host, config.metrics_port)
            self.metrics_port = self._metrics_server.port
        await self._server.start()
        loop = asyncio.get_running_loop()
        self._beating = loop.create_task(self._beat.run(), name=f"{self._label}-beat")
        log.info("listening", service=self._label, address=self.address, metrics_port=self.metrics_port)
        self._loading = loop.create_task(self._bring_up(), name=f"{self._label}-load")

    async def loaded(self) -> None:
        """Return once SERVING; raises what `load` raised."""
        await asyncio.shield(self._loading)

    async def drain(self, grace_s: float | None = None) -> None:
        """NOT_SERVING, refuse new calls, give those in flight `grace_s` seconds (the config's by default), close."""
        if self._drained:
            return
        self._drained = True
        grace_s = self.config.grace_s if grace_s is None else grace_s
        started_s = time.monotonic()
        self._calls.refusal = "the server is draining"
        self.context.draining.set()
        if self._probes is not None:
            self._probes.set_ready(False)
        await self._health.shut_down()
        self._loading.cancel()
        await asyncio.wait([self._loading])
        # gRPC's own graceful stop is not used: it would answer late calls CANCELLED, which nobody retries, and wait for
        # health watchers, which never end. Until the room's own calls are done, the interceptor refuses new ones.
        idle = asyncio.get_running_loop().create_task(self._calls.wait_idle())
        await asyncio.wait([idle], timeout=grace_s)
        finished = idle.done()
        idle.cancel()
        await self._server.stop(None)
        await self.context.stop_background()
        closing = asyncio.get_running_loop().create_task(self.context.close())
        left_s = started_s + grace_s - time.monotonic()
        await asyncio.wait([closing], timeout=max(left_s, CLOSE_PATIENCE_S))
        if not closing.done():
            log.warning("the device is still busy with work that nobody waits for", service=self._label)
        self._beating.cancel()
        if self._probes is not None:
            await asyncio.to_thread(self._probes.close)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        self._authenticator.close()
        await asyncio.to_thread(tracing.stop, self._label)
        if self.config.ready_file is not None:
            self.config.ready_file.unlink(missing_ok=True)
        log.info("drained", service=self._label, finished=finished, seconds=round(time.monotonic() - started_s, 3))

    async def cut_grace(self) -> None:
        """End a drain's grace period: cancel the calls that are still in flight."""
        await self._server.stop(None)

    def _stalled_s(self) -> float:
        """Seconds without progress, asked by the probes' threads."""
        return max(self.context.stalled_s(), self._beat.blocked_s())

    async def _bring_up(self) -> None:
        started_s = time.monotonic()
        for service in await self._load(self.context):
            if service.name not in self._names:
                raise ValueError(f"{service.name} is not among the announced services {self._names}")
            service.add(service.servicer, self._server)
        self._calls.refusal = None
        await self._health.set_serving(True)
        if self._probes is not None and not self._drained:
            self._probes.set_ready(True)
        self._write_ready_file()
        log.info(
            f"serving {self._label} on {self.address}",
            service=self._label,
            port=self.port,
            metrics_port=self.metrics_port,
            load_s=round(time.monotonic() - started_s, 3),
        )

    def _write_ready_file(self) -> None:
        path = self.config.ready_file
        if path is None:
            return
        ports = {"port": self.port, "metrics_port": self.metrics_port, "health_port": self.health_port}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({**ports, **self.context.ports, "pid": os.getpid()}), encoding="utf-8")
        partial.replace(path)


async def run_service(label: str, config: ServiceConfig, *, services: Sequence[str], load: Load) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code: 0 after a drain, 1 where it cannot serve.

    A second signal ends the grace period. What stopped it from serving is logged in one line.
    """
    configure_logs(config.log_level, config.log_format)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = RunningServer(label, config, services=services, load=load, wait_loaded=False)
    try:
        await server.start()
    except StartError as error:
        log.error(f"cannot serve {label}: {error}")
        return 1
    loading = loop.create_task(server.loaded())
    stopping = loop.create_task(stop.wait())
    await asyncio.wait([loading, stopping], return_when=asyncio.FIRST_COMPLETED)
    failed = loading.done() and loading.exception() is not None
    if failed:
        error = loading.exception()
        expected = isinstance(error, StartError) or (
            isinstance(error, Exception) and as_service_error(error) is not None
        )
        log.error(f"cannot serve {label}: {error}", exc_info=None if expected else error)
        await server.drain(grace_s=0)
        return 1
    failing = loop.create_task(server.context.failed.wait())
    await asyncio.wait([stopping, failing], return_when=asyncio.FIRST_COMPLETED)
    draining = loop.create_task(server.drain())
    hurrying = loop.create_task(hurry.wait())
    await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("second signal: ending the grace period", service=label)
        await server.cut_grace()
    await draining
    hurrying.cancel()
    return 1 if server.context.failed.is_set() else 0


def serve(label: str, config: ServiceConfig, *, services: Sequence[str], load: Load) -> int:
    """`run_service` in a fresh event loop: the body of a service's `main`, whose process ends with it.

    Threads still in a long computation or a load cannot be stopped; the process leaves without them.
    """

    async def load_for_good(context: ServerContext) -> Sequence[Service]:
        loaded = await load(context)
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection stops the server to look through it
        gc.enable()
        return loaded

    async def life() -> int:
        code = await run_service(label, config, services=services, load=load_for_good)
        threading.Thread(target=_leave, args=(code,), name="leave", daemon=True).start()
        return code

    return asyncio.run(life())


def _leave(code: int) -> None:
    time.sleep(EXIT_PATIENCE_S)
    log.warning("leaving while threads still run", exit_code=code)
    logging.shutdown()
    os._exit(code)


def _options(config: ServiceConfig) -> list[tuple[str, Any]]:
    size = config.max_message_bytes
    age_s = config.connection_age_s
    # Behind a name with several addresses a client asks for these anew only when a connection ends. Calls in flight
    # finish on the old one, however long they take.
    aging = [] if age_s is None else [("grpc.max_connection_age_ms", round(1000 * age_s))]
    return [
        *aging,
        ("grpc.max_receive_message_length", size),
        ("grpc.max_send_message_length", size),
        ("grpc.so_reuseport", 0),  # or two servers would silently share one port
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _bind(server: grpc.aio.Server, field: str, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    target = _target(host, port)
    try:
        bound = (
            server.add_secure_port(target, credentials) if credentials is not None else server.add_insecure_port(target)
        )
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise StartError(f"{field}: cannot listen on {target}: the port is in use or the address is not this machine's")
    return bound


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"

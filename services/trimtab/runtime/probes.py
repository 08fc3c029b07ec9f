"""Health for probes, on a port and threads of its own that need neither the event loop nor the device.

A plaintext grpc.health.v1 server without request data. What a probe asks for, by service name:

- "readiness", "" and each service's full name: loaded, tried, and not draining.
- "startup": loaded once; stays so.
- "liveness": NOT_SERVING where work waits and the device worker has not got on for `liveness_s`, or the event loop has
  been blocked that long. A process that only loads, or has nothing to do, is alive.

`health` is the same readiness on the services' own port, with their TLS.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from trimtab.runtime.errors import StartError
from trimtab.runtime.health import OVERALL
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

READINESS = "readiness"
STARTUP = "startup"
LIVENESS = "liveness"
BEAT_S = 0.5
THREADS = 2
MOST_CALLS = 64


class EventLoopBeat:
    """Tells other threads how long the event loop has been blocked. `run` is a task on that loop."""

    def __init__(self) -> None:
        self._beat_s = time.monotonic()

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            self._beat_s = time.monotonic()
            await asyncio.sleep(BEAT_S)

    def blocked_s(self) -> float:
        """Seconds since the loop should have beaten."""
        return max(0.0, time.monotonic() - self._beat_s - BEAT_S)


class ProbeServer:
    """Listens from its making on. `stalled_s` says how long the process has not got on; StartError for a taken port."""

    def __init__(
        self, target: str, names: Iterable[str], *, stalled_s: Callable[[], float], liveness_s: float | None
    ) -> None:
        self._ready_names = (OVERALL, READINESS, *names)
        self._servicer = _Servicer(stalled_s, liveness_s)
        for name in (*self._ready_names, STARTUP):
            self._servicer.set(name, _status(False))
        self._servicer.set(LIVENESS, _status(True))
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="probes")
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 * 1024)]
        self._server = grpc.server(threads, options=options, maximum_concurrent_rpcs=MOST_CALLS)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(target)
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise StartError(f"health_port: cannot listen on {target}: the port is in use or not this machine's")
        self._server.start()

    def set_ready(self, ready: bool) -> None:
        """Flip readiness; the first time it is ready, startup is over."""
        for name in self._ready_names:
            self._servicer.set(name, _status(ready))
        if ready:
            self._servicer.started = True
            self._servicer.set(STARTUP, _status(True))

    def close(self) -> None:
        """Stop listening; returns when it has."""
        self._server.stop(None).wait()


class _Servicer(health.HealthServicer):
    """Looks at the process anew each time it is asked whether that lives."""

    def __init__(self, stalled_s: Callable[[], float], liveness_s: float | None) -> None:
        super().__init__()
        self._stalled_s = stalled_s
        self._liveness_s = liveness_s
        self._alive = True
        self.started = False

    def Check(self, request: Any, context: Any) -> Any:
        if request.service == LIVENESS:
            self._look()
        return super().Check(request, context)

    def _look(self) -> None:
        stalled_s = self._stalled_s() if self.started else 0.0
        alive = self._liveness_s is None or stalled_s <= self._liveness_s
        if alive != self._alive:
            self._alive = alive
            self.set(LIVENESS, _status(alive))
            if alive:
                log.info("alive again")
            else:
                log.error("not alive: no progress though work waits, or the event loop is blocked", stalled_s=stalled_s)


def _status(serving: bool) -> Any:
    return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING

"""grpc.health.v1 for one server: one status for every service name and the overall one under "".

NOT_SERVING while the model loads and while the server drains, SERVING in between, also during a hot swap. `probes` is
the same on a port of its own, for those who cannot do TLS. grpcio-health-checking's asyncio servicer is not used: when
one of several watchers of a name leaves, it no longer tells the others.
"""

import asyncio
from collections.abc import Iterable

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

OVERALL = ""
SERVICE = health.SERVICE_NAME
NEWS_S = 0.1
"""How long those who watch are given to hear of the end before the server cuts their calls."""

Status = health_pb2.HealthCheckResponse.ServingStatus.ValueType


class Health(health_pb2_grpc.HealthServicer):
    """The status, offered on the services' own port."""

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = frozenset((OVERALL, *service_names))
        self._serving = False
        self._over = False
        self._changed = asyncio.Condition()
        self._watchers = 0

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def set_serving(self, serving: bool) -> None:
        """Flip every name; watchers are told. Nothing any more after `shut_down`."""
        async with self._changed:
            self._serving = serving and not self._over
            self._changed.notify_all()

    async def shut_down(self) -> None:
        """NOT_SERVING for good; returns when watchers had time to hear of it."""
        self._over = True
        await self.set_serving(False)
        if self._watchers:
            await asyncio.sleep(NEWS_S)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a name that is not served."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service: {request.service!r} is not served here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """The status now and whenever it changes; by the protocol SERVICE_UNKNOWN for a name that is not served."""
        last = None
        self._watchers += 1
        try:
            while True:
                async with self._changed:
                    while (status := self._status(request.service)) == last:
                        await self._changed.wait()
                last = status
                await context.write(health_pb2.HealthCheckResponse(status=status))
        finally:
            self._watchers -= 1

    def _status(self, service: str) -> Status:
        if service not in self._names:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        return health_pb2.HealthCheckResponse.SERVING if self._serving else health_pb2.HealthCheckResponse.NOT_SERVING

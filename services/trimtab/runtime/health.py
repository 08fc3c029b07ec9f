"""grpc.health.v1 for one server: one status per service name and the overall one under "".

NOT_SERVING while the model loads and while the server drains, SERVING in between, also during a hot swap. `probes` is
the same on a port of its own, for those who cannot do TLS.
"""

from collections.abc import Iterable

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

OVERALL = ""
SERVICE = health.SERVICE_NAME


class Health:
    """The statuses, offered on the services' own port."""

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = (OVERALL, *service_names)
        self._servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]: not in the stubs

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set_serving(self, serving: bool) -> None:
        """Flip every name; watchers are told."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._servicer.set(name, status)

    async def shut_down(self) -> None:
        """NOT_SERVING for good."""
        await self._servicer.enter_graceful_shutdown()

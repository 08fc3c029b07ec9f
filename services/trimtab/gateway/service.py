"""The gateway as a process: HTTP beside a gRPC server that speaks the Open Inference Protocol and answers probes."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.gateway.access import Gate
from trimtab.gateway.app import create_app
from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.dialects.oip import SERVICE_NAME, OipServicer
from trimtab.gateway.http_server import HttpServer
from trimtab.gateway.oip_v2 import open_inference_grpc_pb2_grpc
from trimtab.gateway.room import Room
from trimtab.gateway.upstreams import Upstreams
from trimtab.runtime.logs import get_logger
from trimtab.runtime.server import ServerContext, Service, serve

log = get_logger(__name__)

LABEL = "gateway"
SERVICES = (SERVICE_NAME,)


def main(config: GatewayConfig) -> int:
    """Serve until SIGTERM; the process's exit code."""
    return serve(LABEL, config, services=SERVICES, load=load)


async def load(context: ServerContext) -> Sequence[Service]:
    """Open the HTTP port; what `RunningServer` serves beside it. It does not wait for the services behind it.

    Raises StartError where a port is taken or a file cannot be read.
    """
    config = context.config
    assert isinstance(config, GatewayConfig)
    upstreams = Upstreams(config)
    context.on_close(upstreams.close)
    gate = Gate(config, context.authenticator)
    server = HttpServer(create_app(Room(config, upstreams), gate, context.metrics), config)
    await server.start()
    context.on_close(server.close)
    context.ports["http_port"] = server.port
    log.info(f"answering HTTP on {server.address}")
    add = open_inference_grpc_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
    return [Service(SERVICE_NAME, add, OipServicer(config, upstreams, gate))]

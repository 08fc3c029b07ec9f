"""`trimtab health`: whether a server of trimtab is ready, as an exit status; the check of container images."""

from __future__ import annotations

import ssl
from typing import Annotated

import typer

from trimtab.cli.errors import CommandError


def health(
    target: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT[/PATH]", help="A port that speaks no TLS, or the page's address with its path."
        ),
    ] = "127.0.0.1:7200",
    service: Annotated[str, typer.Option(help="A service's name, startup or liveness; empty: is it ready?")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the answer.")] = 4.0,
) -> None:
    """Exit 0 where the server says that it is ready, 1 with the reason where it does not."""
    address, slash, path = target.partition("/")
    answer = _ask_page(address, slash + path, timeout_s) if path else _ask_probe(address, service, timeout_s)
    if answer != "SERVING":
        raise CommandError(f"{target}: {answer}")


def _ask_probe(address: str, service: str, timeout_s: float) -> str:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from trimtab_client.handshakes import explain

    with grpc.insecure_channel(address) as channel:
        asked = health_pb2.HealthCheckRequest(service=service)
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout_s)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]: a Call, too
            return f"{code.name}: {explain(details or '')}"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def _ask_page(address: str, path: str, timeout_s: float) -> str:
    """Over TLS first, whoever signed the certificate: nothing is sent, and one machine asks itself."""
    from http.client import HTTPConnection, HTTPException, HTTPSConnection

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for connection in (
        HTTPSConnection(address, timeout=timeout_s, context=context),
        HTTPConnection(address, timeout=timeout_s),
    ):
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        except ssl.SSLError:
            continue  # it speaks plain HTTP
        except (OSError, HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        return "SERVING" if status == 200 else f"HTTP {status}"
    return "it speaks neither HTTPS nor HTTP"

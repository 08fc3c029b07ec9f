"""uvicorn inside the process's own event loop: listens, and ends with the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.guard import CERTIFICATE_NAMES
from trimtab.runtime.errors import StartError
from trimtab.runtime.tls import http_context

BACKLOG = 2048


class _Connection(H11Protocol):
    """One connection. A caller that takes longer than `head_timeout_s` over a request's head is hung up on.

    It tells the application which names a client's certificate holds; TLS has checked the certificate itself.
    """

    head_timeout_s: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        tls = transport.get_extra_info("ssl_object")
        shown = (tls.getpeercert() or {}) if tls is not None else {}
        names = tuple(value for _, value in shown.get("subjectAltName", ()))
        self.app_state = {**self.app_state, CERTIFICATE_NAMES: names}

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start or stop the clock, by whether the head of a request is still to come."""
        if self.conn.their_state is h11.IDLE:
            self._late = self._late or self.loop.call_later(self.head_timeout_s, self.transport.close)
        elif self._late is not None:
            self._late.cancel()
            self._late = None


class _Quiet(uvicorn.Server):
    """Leaves signals to the process's own handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """One HTTP port. StartError where it is taken or the certificate cannot be read."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._config = config
        context = http_context(config)
        connection = type("Connection", (_Connection,), {"head_timeout_s": config.body_timeout_s})
        settings = uvicorn.Config(
            app,
            log_config=None,
            log_level=config.log_level,
            access_log=False,  # the guard logs, with request ids
            server_header=False,
            http=connection,
            lifespan="off",
            ws="none",
            h11_max_incomplete_event_size=64 * 1024,
            timeout_graceful_shutdown=max(1, round(config.grace_s)),
            ssl_context_factory=(lambda config, default: context) if context is not None else None,
        )
        self._server = _Quiet(settings)
        self._serving: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """The URL as a client on this machine opens it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}.get(self._config.host, self._config.host)
        return f"{'https' if self._config.has_tls else 'http'}://{host}:{self.port}"

    async def start(self) -> None:
        """Listen."""
        bound = _bind(self._config)
        self.port = bound.getsockname()[1]
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[bound]), name="gateway-http")

    async def close(self) -> None:
        """Refuse new connections, let requests finish within the grace period, and end."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)


def _bind(config: GatewayConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host.strip("[]"), config.http_port))
        bound.listen(BACKLOG)  # who asks before uvicorn is ready waits instead of being refused
    except OSError as error:
        bound.close()
        raise StartError(f"http_port: cannot listen on {config.host}:{config.http_port}: {error.strerror}") from None
    return bound

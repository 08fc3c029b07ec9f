"""Counts and times the requests of an HTTP server in the metrics that every server of trimtab has."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from trimtab.runtime.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

NO_ROUTE = "none"


class HttpMetrics:
    """ASGI middleware. The method label is the route's pattern ('/tasks/{id}'), never the path that was asked for."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.monotonic(), 500

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._metrics.requests.labels("http", route, str(status)).inc()
            self._metrics.request_seconds.labels("http", route).observe(time.monotonic() - started_s)

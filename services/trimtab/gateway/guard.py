"""What surrounds every HTTP request, from its first byte to its log line.

A request gets an id, its caller is let in (or not) before a byte of the body is read, the body must be small enough
and come soon enough, the answer must be there by the deadline, and a caller that goes away ends the work. Callers who
are not known, and what is refused, take none of the room that known callers have.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import time
import uuid
from dataclasses import dataclass

import structlog
from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.gateway.access import OPEN_TO_ALL, Caller, Gate, route_of
from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.problems import Problem, unprocessable
from trimtab.gateway.slots import Slots
from trimtab.runtime.logs import get_logger
from trimtab.runtime.metrics import Metrics

log = get_logger(__name__)

REQUEST_ID = "x-request-id"
TIMEOUT = "x-timeout-s"
CERTIFICATE_NAMES = "certificate_names"  # where the HTTP server puts those of a client's certificate
_ID = re.compile(r"[\x21-\x7e]{1,128}")
# The services are given the deadline itself; what is still not there this much later is cut off here.
LATE_S = 2.0
LINGER_S = 1.0
LINGERING_AT_ONCE = 64
OPEN_AT_ONCE = 64
OPEN_BODY_BYTES = 32 * 1024
"""Of the routes that are open to all: the longest token that signs in is half of that."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)


@dataclass(frozen=True)
class Visit:
    """One request: its id, its caller and the host that they call from, its deadline on `time.monotonic`."""

    request_id: str
    caller: Caller
    host: str
    until: float

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.001, self.until - time.monotonic())


def visit_of(request: Request) -> Visit:
    """The visit that the guard made of a request."""
    return request.scope["trimtab.visit"]


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, gate: Gate, metrics: Metrics) -> None:
        self._app = app
        self._config = config
        self._gate = gate
        self._metrics = metrics
        self._known = Slots(config.limits.max_concurrent_calls)
        self._anybody = Slots(OPEN_AT_ONCE)
        self._lingering = Slots(LINGERING_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send, request_id(Headers(scope=scope)))
        structlog.contextvars.bind_contextvars(request_id=answer.request_id)
        try:
            await self._serve(scope, receive, answer)
        except Problem as problem:
            if not answer.body_read and problem.status != 408 and not self._lingering.is_full:
                with self._lingering.one():
                    answer.body_read = await _discard(receive)
            await answer.refuse(problem)
        except Exception as error:
            log.error("request failed", path=scope["path"], exc_info=error)
            await answer.refuse(Problem("INTERNAL", "the gateway failed; its log says why, under this request's id"))
        finally:
            self._finished(scope, answer)
            structlog.contextvars.unbind_contextvars("request_id")

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        headers = Headers(scope=scope)
        answer.route = route_of(scope["path"])
        host = scope["client"][0] if scope.get("client") else "local"
        names = scope.get("state", {}).get(CERTIFICATE_NAMES, ())
        caller = await self._gate.admit(answer.route, headers, names, host)
        answer.caller = caller.name
        if answer.route is None:
            raise Problem("NOT_FOUND", f"{scope['path']} is no route; /openapi.json lists them")
        with (self._anybody if answer.route in OPEN_TO_ALL else self._known).one():
            timeout_s = self._timeout_s(headers)
            body = await self._body(headers, receive, answer)
            if body and "json" not in headers.get("content-type", ""):
                problem = "content-type: send application/json"
                raise Problem("INVALID_ARGUMENT", problem, field="content-type", status=415)
            visit = Visit(answer.request_id, caller, host, time.monotonic() + timeout_s)
            await _run(self._app, {**scope, "trimtab.visit": visit}, body, receive, answer, timeout_s + LATE_S)

    def _timeout_s(self, headers: Headers) -> float:
        given = headers.get(TIMEOUT)
        if given is None:
            return self._config.timeout_s
        try:
            timeout_s = float(given)
        except ValueError:
            timeout_s = math.nan
        if not 0 < timeout_s <= self._config.max_timeout_s:
            raise unprocessable(TIMEOUT, f"give seconds, more than 0 and at most {self._config.max_timeout_s:g}")
        return timeout_s

    async def _body(self, headers: Headers, receive: Receive, answer: _Answer) -> bytes:
        most = self._config.max_body_bytes
        if answer.route in OPEN_TO_ALL:
            most = min(most, OPEN_BODY_BYTES)
        too_large = Problem("OUT_OF_RANGE", f"body: at most {most:,} bytes", field="body", status=413)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise too_large
        parts: list[bytes] = []
        held = 0
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem("CANCELLED", "the caller went away")
                    parts.append(message.get("body", b""))
                    held += len(parts[-1])
                    if held > most:
                        raise too_large
                    if not message.get("more_body", False):
                        answer.body_read = True
                        return b"".join(parts)
        except TimeoutError:
            raise Problem("DEADLINE_EXCEEDED", "body: did not arrive in time", field="body", status=408) from None

    def _finished(self, scope: Scope, answer: _Answer) -> None:
        seconds = time.monotonic() - answer.started_s
        route = answer.route or "other"
        self._metrics.requests.labels("http", route, str(answer.status)).inc()
        self._metrics.request_seconds.labels("http", route).observe(seconds)
        log.info(
            "request",
            method=scope["method"],
            route=route,
            status=answer.status,
            seconds=round(seconds, 4),
            caller=answer.caller,
        )


class _Answer:
    """One response on its way out, with the headers that every response has."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._scope = scope
        self._send = send
        self.request_id = request_id
        self.route: str | None = None
        self.caller = ""
        self.status = 499  # nothing was sent: the caller went away
        self.body_read = False
        self.started = False
        self.started_s = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            own = (REQUEST_ID.encode(), self.request_id.encode())
            message["headers"] = [*message.get("headers", []), *HEADERS, own]
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Send the refusal, if nothing was sent before."""
        if self.started or problem.code == "CANCELLED":
            return
        response = problem.response(self.request_id, like_openai=like_openai(self._scope["path"]))
        if not self.body_read:  # the rest of its body may still come
            response.headers["connection"] = "close"
        await response(self._scope, _nothing, self.send)


def request_id(headers: Headers) -> str:
    """The caller's own id where it is one of 1 to 128 visible characters, else a fresh one."""
    given = headers.get(REQUEST_ID, "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def like_openai(path: str) -> bool:
    """Whether a path is of OpenAI's dialect."""
    return path in ("/v1/completions", "/v1/chat/completions") or path.startswith("/v1/models")


async def _run(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, answer: _Answer, limit_s: float) -> None:
    """The application with a body that is there already; cancelled when the caller goes away or it is too late."""
    replayed = False
    gone = asyncio.Event()

    async def from_here() -> Message:
        nonlocal replayed
        if not replayed:
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(app(scope, from_here, answer.send))  # type: ignore[arg-type]
    watching = asyncio.create_task(until_gone())
    try:
        done, _ = await asyncio.wait([working, watching], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            await working
        elif not done:
            raise Problem("DEADLINE_EXCEEDED", "the answer was not there in time")
    finally:
        gone.set()
        for task in (working, watching):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(working, watching, return_exceptions=True)


async def _discard(receive: Receive) -> bool:
    """Let a refused body pass by for a moment: a caller that is still sending would else never read the refusal.

    Whether all of it has passed.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
            return message["type"] == "http.request"
    return False


async def _nothing() -> Message:
    return {"type": "http.disconnect"}

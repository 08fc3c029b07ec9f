"""What surrounds every call: tokens, refusals while loading or draining, errors to statuses, metrics, logs of faults.

An interceptor over the room's own services; health and reflection pass untouched.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc import StatusCode

from trimtab.runtime.auth import TokenFile
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import ServiceError, abort, as_service_error, exhausted, internal, unavailable
from trimtab.runtime.logs import get_logger
from trimtab.runtime.metrics import Metrics

log = get_logger(__name__)

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Any]
INFRASTRUCTURE = ("/grpc.health.", "/grpc.reflection.")
FAULTS = (StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.DATA_LOSS)


def deadline_of(context: grpc.aio.ServicerContext) -> float | None:
    """The call's deadline in `time.monotonic()` seconds, or None without one."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Counts, refuses and translates. `refusal` is set while the server loads or drains, None while it serves."""

    def __init__(self, metrics: Metrics, limits: RequestLimits, tokens: TokenFile | None = None) -> None:
        self._metrics = metrics
        self._tokens = tokens
        self._limits = limits
        self.refusal: str | None = "the server is loading its model"
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no call is being served."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        method = handler_call_details.method
        if method.startswith(INFRASTRUCTURE):
            return await continuation(handler_call_details)
        if self._tokens is not None:
            metadata: Any = handler_call_details.invocation_metadata  # pyright: ignore: missing in the stubs
            denied = self._tokens.refusal(method, metadata)
            if denied is not None:
                return _refusing(denied)
        if self.refusal is not None:
            return _refusing(unavailable(self.refusal))
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        _, service, name = method.split("/")
        if handler.unary_unary is not None:
            wrap, behaviour = grpc.unary_unary_rpc_method_handler, self._unary(handler.unary_unary, service, name)
        elif handler.unary_stream is not None:
            wrap, behaviour = grpc.unary_stream_rpc_method_handler, self._stream(handler.unary_stream, service, name)
        else:
            raise TypeError(f"{method}: client streams have no place in the wire contract")
        return wrap(behaviour, handler.request_deserializer, handler.response_serializer)

    def _unary(self, behaviour: Behaviour, service: str, method: str) -> Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with _Call(self, service, method, context):
                return await behaviour(request, context)

        return call

    def _stream(self, behaviour: Behaviour, service: str, method: str) -> Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with _Call(self, service, method, context):
                async for response in behaviour(request, context):
                    yield response

        return call

    def _enter(self) -> None:
        self._in_flight += 1
        self._idle.clear()
        self._metrics.in_flight.set(self._in_flight)

    def _leave(self, service: str, method: str, code: StatusCode, seconds: float) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
        self._metrics.in_flight.set(self._in_flight)
        self._metrics.requests.labels(service, method, code.name).inc()
        self._metrics.request_seconds.labels(service, method).observe(seconds)

    def overload(self) -> ServiceError | None:
        """The refusal for one call too many, or None."""
        most = self._limits.max_concurrent_calls
        return exhausted(f"{most} calls are in flight", retry_after_s=1.0) if self._in_flight > most else None


class _Call:
    """One call from its first line to its status."""

    def __init__(
        self, interceptor: CallInterceptor, service: str, method: str, context: grpc.aio.ServicerContext
    ) -> None:
        self._interceptor = interceptor
        self._service = service
        self._method = method
        self._context = context
        self._started_s = 0.0

    async def __aenter__(self) -> None:
        self._started_s = time.monotonic()
        self._interceptor._enter()
        overload = self._interceptor.overload()
        if overload is not None:
            self._finish(overload.code)
            await abort(self._context, overload)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._finish(_set_code(self._context) or StatusCode.OK)
        elif isinstance(error, grpc.aio.AbortError):
            self._finish(_set_code(self._context) or StatusCode.UNKNOWN)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            remaining_s = self._context.time_remaining()
            late = remaining_s is not None and remaining_s <= 0
            self._finish(StatusCode.DEADLINE_EXCEEDED if late else StatusCode.CANCELLED)
        elif isinstance(error, Exception):
            refusal = as_service_error(error)
            if refusal is None:
                log.error("call failed", service=self._service, method=self._method, exc_info=error)
                refusal = internal(f"{self._method} failed in the server ({type(error).__name__}); its log says why")
            elif refusal.code in FAULTS:
                log.error("call failed", service=self._service, method=self._method, reason=refusal.message)
            self._finish(refusal.code)
            await abort(self._context, refusal)

    def _finish(self, code: StatusCode) -> None:
        seconds = time.monotonic() - self._started_s
        self._interceptor._leave(self._service, self._method, code, seconds)
        log.debug("call", service=self._service, method=self._method, code=code.name, seconds=round(seconds, 4))


def _set_code(context: grpc.aio.ServicerContext) -> StatusCode | None:
    """The code that a handler set, which grpc.aio gives back as an int or a StatusCode."""
    code = context.code()
    if isinstance(code, StatusCode):
        return code
    return next((known for known in StatusCode if known.value[0] == code), None)


def _refusing(error: ServiceError) -> Any:
    async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)

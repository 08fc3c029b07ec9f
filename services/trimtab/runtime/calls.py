"""What surrounds every call: who calls, refusals while loading or draining, errors to statuses, metrics, the audit log.

An interceptor over everything but health. A caller is known and allowed before a byte of the request is waited for:
to grpc.aio every method takes a stream of requests, which on the wire is the same, as it reads a single one by itself.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc import StatusCode

from trimtab.runtime import tracing
from trimtab.runtime.audit import AuditLog, target_of
from trimtab.runtime.auth import ANYONE, Authenticator, Principal, require
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import ServiceError, abort, as_service_error, exhausted, internal, invalid, unavailable
from trimtab.runtime.logs import get_logger
from trimtab.runtime.metrics import Metrics
from trimtab.runtime.roles import PUBLIC, rule_of
from trimtab.runtime.wire_faults import fault_in

log = get_logger(__name__)

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Any]
Parse = Callable[[bytes], Any]
SAN_PROPERTY = "x509_subject_alternative_name"
# Who makes the call that is being served, in the task that serves it.
CALLER: ContextVar[Principal] = ContextVar("caller", default=ANYONE)
# A request that is not here so long after its call is given up; it may be as large as max_message_bytes.
ARRIVAL_S = 120.0
FAULTS = (StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.DATA_LOSS)


def deadline_of(context: grpc.aio.ServicerContext) -> float | None:
    """The call's deadline in `time.monotonic()` seconds, or None without one."""
    remaining_s = context.time_remaining()
    return None if remaining_s is None else time.monotonic() + remaining_s


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Counts, refuses and translates. `refusal` is set while the server loads or drains, None while it serves."""

    def __init__(
        self,
        metrics: Metrics,
        limits: RequestLimits,
        authenticator: Authenticator | None = None,
        audit: AuditLog | None = None,
        label: str = "",
    ) -> None:
        self._metrics = metrics
        self._limits = limits
        self._authenticator = authenticator or Authenticator(AuthConfig())
        self.audit = audit or AuditLog()
        self.label = label
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
        rule = rule_of(method)
        if rule is not None and rule.needs == PUBLIC:
            return _public(await continuation(handler_call_details), method)
        if self.refusal is not None:
            return grpc.stream_unary_rpc_method_handler(self._refusing(method, self.refusal))
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            behaviour = self._unary(handler.unary_unary, method, parse)
            return grpc.stream_unary_rpc_method_handler(behaviour, None, serialize)
        if handler.unary_stream is not None:
            behaviour = self._stream(handler.unary_stream, method, parse)
            return grpc.stream_stream_rpc_method_handler(behaviour, None, serialize)
        if handler.stream_stream is not None:
            behaviour = self._both(handler.stream_stream, method, parse)
            return grpc.stream_stream_rpc_method_handler(behaviour, None, serialize)
        raise TypeError(f"{method}: client streams have no place in the wire contract")

    async def admit(self, method: str, context: grpc.aio.ServicerContext) -> Principal:
        """Who calls; UNAUTHENTICATED, or PERMISSION_DENIED where they may not call this method."""
        if self._authenticator.is_open:
            principal = ANYONE
        else:
            metadata: Any = context.invocation_metadata() or ()
            names = context.auth_context().get(SAN_PROPERTY, ())
            principal = await self._authenticator.admit(metadata, [str(name, "utf-8", "replace") for name in names])
        rule = rule_of(method)
        try:
            if rule is None:
                raise ServiceError(
                    StatusCode.PERMISSION_DENIED, f"{method} has no rule in trimtab.runtime.roles: nobody may call it"
                )
            require(principal, rule.needs)
        except ServiceError as error:
            if rule is not None and rule.audited:
                self.audit.act(who=principal.name, what=method, outcome=error.code.name, peer=context.peer())
            raise
        return principal

    def _refusing(self, method: str, reason: str) -> Behaviour:
        async def refuse(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
            try:
                await self.admit(method, context)
            except ServiceError as error:
                await abort(context, error)
            await abort(context, unavailable(reason))

        return refuse

    def _unary(self, behaviour: Behaviour, method: str, parse: Parse) -> Behaviour:
        async def respond(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
            async with _Call(self, method, context) as call:
                return await behaviour(await call.request(parse), context)

        return respond

    def _stream(self, behaviour: Behaviour, method: str, parse: Parse) -> Behaviour:
        async def respond(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with _Call(self, method, context) as call:
                async for response in behaviour(await call.request(parse), context):
                    yield response

        return respond

    def _both(self, behaviour: Behaviour, method: str, parse: Parse) -> Behaviour:
        """Reflection: a conversation that a drain does not wait for."""

        async def respond(payloads: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async def requests() -> AsyncIterator[Any]:
                async for payload in payloads:
                    yield parsed(payload, parse, method)

            try:
                await self.admit(method, context)
                async for response in behaviour(requests(), context):
                    yield response
            except ServiceError as error:
                await abort(context, error)

        return respond

    def _enter(self) -> None:
        self._in_flight += 1
        self._idle.clear()
        self._metrics.in_flight.set(self._in_flight)

    def _leave(self, service: str, method: str, code: StatusCode, seconds: float) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
        self._metrics.in_flight.set(self._in_flight)
        self._metrics.observe_call(service, method, code.name, seconds)

    def overload(self) -> ServiceError | None:
        """The refusal for one call too many, or None."""
        most = self._limits.max_concurrent_calls
        return exhausted(f"{most} calls are in flight", retry_after_s=1.0) if self._in_flight > most else None


class _Call:
    """One call from its first line to its status."""

    def __init__(self, interceptor: CallInterceptor, method: str, context: grpc.aio.ServicerContext) -> None:
        self._interceptor = interceptor
        self._path = method
        _, self._service, self._method = method.split("/")
        self._context = context
        self._started_s = 0.0
        self._principal: Principal | None = None
        self._target = ""
        self._span = tracing.call_span(interceptor.label, method, context.invocation_metadata())

    async def __aenter__(self) -> Self:
        self._started_s = time.monotonic()
        self._traced = self._span.__enter__()
        self._interceptor._enter()
        try:
            overload = self._interceptor.overload()
            if overload is not None:
                raise overload
            self._principal = await self._interceptor.admit(self._path, self._context)
            CALLER.set(self._principal)
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def request(self, parse: Parse) -> Any:
        """The request; INVALID_ARGUMENT for bytes that are no message of its kind, or where none comes."""
        try:
            async with asyncio.timeout(ARRIVAL_S):
                payload = await self._context.read()
        except TimeoutError:
            raise ServiceError(
                StatusCode.DEADLINE_EXCEEDED, f"the request did not arrive within {ARRIVAL_S:g} s of its call"
            ) from None
        if not isinstance(payload, bytes):  # grpc.aio.EOF
            raise invalid("request", "none came with the call, or one larger than the server takes")
        request = parsed(payload, parse, self._path)
        rule = rule_of(self._path)
        if rule is not None and rule.audited:
            self._target = target_of(request)
        return request

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
        rule = rule_of(self._path)
        if rule is not None and rule.audited and self._principal is not None:
            who, peer = self._principal.name, self._context.peer()
            self._interceptor.audit.act(who=who, what=self._path, target=self._target, outcome=code.name, peer=peer)
        self._interceptor._leave(self._service, self._method, code, seconds)
        if self._traced is not None:
            self._traced.set_attribute("rpc.grpc.status_code", code.name)
        self._span.__exit__(None, None, None)
        log.debug("call", service=self._service, method=self._method, code=code.name, seconds=round(seconds, 4))


def parsed(payload: bytes, parse: Parse, method: str) -> Any:
    """A request of `method`; INVALID_ARGUMENT naming the field at which the bytes stop being one."""
    try:
        return parse(payload)
    except DecodeError:
        field, reason = fault_in(method, payload)
        raise invalid(field, reason) from None


def _public(handler: Any, method: str) -> Any:
    """A handler of health, which anybody may call at any time; only its requests are parsed here."""
    if handler is None:
        return None
    parse, serialize = handler.request_deserializer, handler.response_serializer

    behaviour = handler.unary_unary or handler.unary_stream  # its stream too is a coroutine, which writes by itself

    async def respond(payload: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            request = parsed(payload, parse, method)
        except ServiceError as error:
            await abort(context, error)
        else:
            return await behaviour(request, context)

    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(respond, None, serialize)
    return grpc.unary_stream_rpc_method_handler(respond, None, serialize)


def _set_code(context: grpc.aio.ServicerContext) -> StatusCode | None:
    """The code that a handler set, which grpc.aio gives back as an int or a StatusCode."""
    code = context.code()
    if isinstance(code, StatusCode):
        return code
    return next((known for known in StatusCode if known.value[0] == code), None)

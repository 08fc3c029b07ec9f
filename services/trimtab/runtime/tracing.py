"""Traces by OpenTelemetry, off unless a collector is named: then each server sends its spans there over OTLP gRPC.

A server opens a span for each call, joined to the caller's by the W3C headers in the metadata; the trainer opens one
for each batch and each stage of it, and trimtab's clients carry the current one along. Without a collector nothing of
OpenTelemetry is imported and every function here does nothing. Spans carry counts, seeds and steps, never texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trimtab.runtime.errors import StartError
from trimtab_client import trace_context

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

EXPORT_TIMEOUT_S = 5
FLUSH_TIMEOUT_S = 5.0
Attribute = str | bool | int | float | Sequence[str] | Sequence[int]

_providers: dict[str, "TracerProvider"] = {}


def start(service: str, endpoint: str | None) -> None:
    """Send the spans of `service` to a collector ("host:port", or a URL: https is TLS); None: send none.

    Raises StartError where OpenTelemetry is not installed.
    """
    if endpoint is None or service in _providers:
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartError(f"otlp_endpoint: {error.name} is not installed: pip install 'trimtab[tracing]'") from None
    address = endpoint if "://" in endpoint else f"http://{endpoint}"
    exporter = OTLPSpanExporter(address, insecure=address.startswith("http://"), timeout=EXPORT_TIMEOUT_S)
    provider = TracerProvider(resource=Resource.create({"service.name": f"trimtab-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    _providers[service] = provider
    trace_context.set_carrier(_headers)


def stop(service: str) -> None:
    """Send what is left and forget the service's collector; blocks for `FLUSH_TIMEOUT_S` at most."""
    provider = _providers.pop(service, None)
    if provider is None:
        return
    provider.force_flush(round(FLUSH_TIMEOUT_S * 1000))
    provider.shutdown()
    if not _providers:
        trace_context.set_carrier(None)


@contextmanager
def span(
    service: str,
    name: str,
    attributes: Mapping[str, Attribute] | None = None,
    *,
    parent: "Context | None" = None,
    links: "Sequence[Span | None]" = (),
) -> "Iterator[Span | None]":
    """A span of a service that is current inside; None where the service is not traced.

    `parent` is a context that `current()` gave, by default the current one; `links` are spans that it works on too.
    """
    provider = _providers.get(service)
    if provider is None:
        yield None
        return
    from opentelemetry.trace import Link

    linked = [Link(other.get_span_context()) for other in links if other is not None]
    tracer = provider.get_tracer("trimtab")
    with tracer.start_as_current_span(name, parent, attributes=dict(attributes or {}), links=linked) as opened:
        yield opened


def mark(service: str, name: str, attributes: Mapping[str, Attribute], since_ns: int | None = None) -> "Span | None":
    """A span that is over already, begun at `since_ns` (time.time_ns), under the current one; None without tracing."""
    provider = _providers.get(service)
    if provider is None:
        return None
    opened = provider.get_tracer("trimtab").start_span(name, attributes=dict(attributes), start_time=since_ns)
    opened.end()
    return opened


def current() -> "Context | None":
    """The current context, to be a `parent` in another thread; None where nothing is traced."""
    if not _providers:
        return None
    from opentelemetry.context import get_current

    return get_current()


@contextmanager
def call_span(service: str, method: str, metadata: Any) -> "Iterator[Span | None]":
    """The span of one call that a server answers; `method` is '/package.Service/Method'."""
    if service not in _providers:
        yield None
        return
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    rpc_service, _, rpc_method = method.lstrip("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": rpc_service, "rpc.method": rpc_method}
    tracer = _providers[service].get_tracer("trimtab")
    with tracer.start_as_current_span(
        method.lstrip("/"), extract(carrier), kind=SpanKind.SERVER, attributes=attributes
    ) as opened:
        yield opened


def _headers() -> list[tuple[str, str]]:
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return list(carrier.items())

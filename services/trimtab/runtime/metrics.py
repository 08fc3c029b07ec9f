"""Prometheus metrics of one server and the small HTTP server that shows them on a port of its own.

Each server has its own registry, so that several can live in one process. Metrics carry no request data.
"""

from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from trimtab.runtime.errors import StartError

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """The metrics every room reports; a room adds its own to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.requests = Counter(
            "trimtab_requests", "Finished calls.", ["service", "method", "code"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "trimtab_request_seconds",
            "Duration of a call.",
            ["service", "method"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("trimtab_requests_in_flight", "Calls being served.", registry=self.registry)
        self.queue_depth = Gauge("trimtab_queue_depth", "Sequences that wait for the device.", registry=self.registry)
        self.batch_seconds = Histogram(
            "trimtab_batch_seconds",
            "Device time of a batch.",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.batch_tokens = Histogram(
            "trimtab_batch_tokens", "Tokens of a batch.", buckets=TOKEN_BUCKETS, registry=self.registry
        )
        self.sequences = Counter("trimtab_sequences", "Sequences computed.", registry=self.registry)
        self.tokens = Counter("trimtab_tokens", "Tokens computed.", registry=self.registry)
        self.model_step = Gauge("trimtab_model_step", "Step of the version being served.", registry=self.registry)
        self.version_loads = Counter(
            "trimtab_version_loads", "Versions staged, by result (ok or failed).", ["result"], registry=self.registry
        )

    def observe_call(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count one call that has ended."""
        key = (service, method, code)
        if key not in self._calls:  # looking a child up by its labels takes longer than counting
            self._calls[key] = self.requests.labels(*key), self.request_seconds.labels(service, method)
        counter, histogram = self._calls[key]
        counter.inc()
        histogram.observe(seconds)

    def observe_batch(self, sequences: int, tokens: int, seconds: float) -> None:
        """Count one batch that the device computed."""
        self.sequences.inc(sequences)
        self.tokens.inc(tokens)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)


@dataclass(frozen=True)
class MetricsServer:
    """The HTTP server of /metrics."""

    server: WSGIServer
    thread: Thread

    @classmethod
    def start(cls, metrics: Metrics, host: str, port: int) -> "MetricsServer":
        """Listen; port 0 takes a free one. StartError where the port is taken."""
        try:
            server, thread = start_http_server(port, addr=host, registry=metrics.registry)
        except OSError as error:
            raise StartError(f"metrics_port: cannot listen on {host}:{port}: {error.strerror}") from None
        return cls(server, thread)

    @property
    def port(self) -> int:
        return self.server.server_port

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

"""`trimtab label serve`: pages and API over HTTP until SIGTERM, and a feeder that asks generators for answers."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn

from trimtab.labeling.config import LabelingConfig
from trimtab.labeling.database import Database
from trimtab.labeling.feeding import Feeder
from trimtab.labeling.web.app import create_app
from trimtab.labeling.web.room import Room
from trimtab.runtime.errors import StartError
from trimtab.runtime.http_metrics import HttpMetrics
from trimtab.runtime.logs import configure_logs, get_logger
from trimtab.runtime.metrics import Metrics, MetricsServer
from trimtab.runtime.tls import http_context

log = get_logger(__name__)


def main(config: LabelingConfig) -> int:
    """Serve until SIGTERM or ctrl-C, then finish running requests; 0. StartError, DatabaseError where it cannot."""
    configure_logs(config.log_level, config.log_format)
    database = Database(config.database)
    database.migrate()
    bound = _bind(config)
    metrics, metrics_server = Metrics(), None
    if config.metrics_port is not None:
        metrics_server = MetricsServer.start(metrics, config.host, config.metrics_port)
    app = HttpMetrics(create_app(Room(database, config)), metrics)
    server = uvicorn.Server(_uvicorn(config, app))
    feeder = _feeder(config, database) if config.feed else None
    address = f"{'https' if config.has_tls else 'http'}://{config.host}:{bound.getsockname()[1]}"
    if feeder is not None:
        feeder.start()
    metrics_port = metrics_server.port if metrics_server else None
    log.info("serving labeling", address=address, metrics_port=metrics_port)
    if config.ready_file is not None:
        _write_ready(config.ready_file, bound.getsockname()[1], metrics_port)
    # uvicorn stops at SIGTERM and ctrl-C by itself, and raises the signal anew when it has: that one is for nobody.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    finally:
        if feeder is not None:
            feeder.stop()
        if metrics_server is not None:
            metrics_server.close()
        database.close()
    return 0


def _uvicorn(config: LabelingConfig, app: HttpMetrics) -> uvicorn.Config:
    context = http_context(config)
    return uvicorn.Config(
        app,
        log_config=None,
        log_level=config.log_level,
        access_log=False,  # addresses hold no secrets, but who did what when is in the database already
        server_header=False,
        date_header=True,
        timeout_graceful_shutdown=round(config.grace_s),
        ssl_context_factory=(lambda config, default: context) if context is not None else None,
    )


def _bind(config: LabelingConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host.strip("[]"), config.port))
        bound.listen(2048)  # who asks before uvicorn is ready waits instead of being refused
    except OSError as error:
        bound.close()
        raise StartError(f"port: cannot listen on {config.host}:{config.port}: {error.strerror}") from None
    return bound


def _feeder(config: LabelingConfig, database: Database) -> Feeder:
    try:
        return Feeder(database, config.generator_options())
    except (OSError, ValueError) as error:
        raise StartError(f"generator_*: {error}") from error


def _write_ready(path: Path, port: int, metrics_port: int | None) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps({"port": port, "metrics_port": metrics_port}))
    partial.replace(path)

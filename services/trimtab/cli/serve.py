"""`trimtab serve NAME`: run one service in this process until SIGTERM."""

from __future__ import annotations

import gc
import importlib
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.settings import merged, parse_assignments


class Service(StrEnum):
    """The services that can be served."""

    GENERATOR = "generator"
    REWARD = "reward"
    REFERENCE = "reference"
    TRAINER = "trainer"
    GATEWAY = "gateway"


def serve(
    name: Annotated[Service, typer.Argument(help="Which service.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of the service's settings.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder, hub id, or version:RUN/NAME[@STEP].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    store: Annotated[str | None, typer.Option(help="Folder or fsspec URL of the version store.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; beyond this machine only with TLS.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain of the server.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of that certificate.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="Who may call, as `trimtab keys` writes it.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS, open to everybody.")
    ] = False,
) -> None:
    """Run one service until SIGTERM. Settings come from the file, then TRIMTAB_* variables, then flags."""
    from trimtab.rounds.launchers.services import SERVICES, thread_environment
    from trimtab.runtime.config import load_config

    flags: dict[str, Any] = {"model": model, "port": port, "store": store, "host": host}
    flags |= {"tls_cert": tls_cert, "tls_key": tls_key, "insecure": insecure or None}
    flags["auth"] = {"keys_file": keys_file} if keys_file else None
    given = {key: value for key, value in flags.items() if value is not None}
    kind = SERVICES[name.value]
    config_class = getattr(importlib.import_module(kind.config_module), kind.config_class)
    settings = load_config(config_class, config, merged(parse_assignments(assignments or []), given))
    if settings.threads:  # read by OpenMP when torch is first imported
        for key, value in thread_environment(settings.threads).items():
            os.environ.setdefault(key, value)
    # Looking for garbage among what imports leave takes up to a quarter of their time; once all is loaded,
    # `runtime.server.serve` switches it on again.
    gc.disable()
    raise typer.Exit(importlib.import_module(kind.service_module).main(settings))

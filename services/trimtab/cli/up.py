"""`trimtab up`: all services of one YAML file as supervised local processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def up(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file with a section per service.")] = Path(
        "up.yaml"
    ),
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS, open to everybody.")
    ] = False,
) -> None:
    """Run services locally until ctrl-C. One that dies is restarted; one that keeps dying ends all."""
    from trimtab.cli.signals import stop_requested
    from trimtab.cli.up_config import load_up_config, process_specs
    from trimtab.cli.up_view import UpView
    from trimtab.rounds.launchers.local import Supervisor

    settings = load_up_config(config, {"insecure": True} if insecure else {})
    view = UpView()
    with stop_requested() as stop, view, Supervisor(on_event=view.event, grace_s=settings.grace_s) as supervisor:
        supervisor.add(*process_specs(settings))
        while not stop.wait(0.25):
            supervisor.raise_failure()
            supervisor.raise_late(settings.ready_timeout_s)
            view.refresh(supervisor)
        typer.echo("stopping …")

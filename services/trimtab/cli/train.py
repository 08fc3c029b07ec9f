"""`trimtab train sft|reward|ppo`: start a run at a trainer service and watch it to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.connection import TlsCa, TlsCert, TlsFlag, TlsKey, TokenFile, channel_options
from trimtab.cli.settings import merged, parse_assignments, read_yaml


class Stage(StrEnum):
    """The training stages."""

    SFT = "sft"
    REWARD = "reward"
    PPO = "ppo"


def train(
    stage: Annotated[Stage, typer.Argument(help="Which stage.")],
    config: Annotated[Path, typer.Argument(help="YAML file of the stage; keys as in trainer.proto.")],
    run_id: Annotated[str, typer.Option(help="Your name for the run; the same name and config again goes on.")],
    address: Annotated[str | None, typer.Option(help="HOST:PORT of a trainer; without it one is started here.")] = None,
    store: Annotated[str, typer.Option(envvar="TRIMTAB_STORE", help="Store of a trainer started here.")] = "runs/store",
    folder: Annotated[Path, typer.Option(help="Where logs and metrics of a trainer started here go.")] = Path("runs"),
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting.")] = None,
    tls: TlsFlag = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Train one stage and show its metrics. ctrl-C ends the run after the current step."""
    from trimtab.cli.signals import sigterm_interrupts
    from trimtab.cli.stage_config import stage_config
    from trimtab.cli.watch_run import RunWatcher

    values = merged(read_yaml(config), parse_assignments(assignments or []))
    proto = stage_config(stage.value, values, str(config))
    options = channel_options(address, tls, tls_ca, tls_cert, tls_key, token_file) if address else None
    with sigterm_interrupts(), trainer_at(address, store, folder, run_id) as (where, recover):
        RunWatcher(where, stage.value, run_id, proto, recover, options).run()


@contextmanager
def trainer_at(
    address: str | None, store: str, folder: Path, run_id: str
) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """The address of a trainer that serves, and what waits for its return when it is gone (None: nobody brings it)."""
    from trimtab.rounds.launchers.local import Supervisor
    from trimtab.rounds.launchers.services import fair_threads, service_process

    if address is not None:
        yield address, None
        return
    settings = {"store": store, "folder": str(folder)}
    spec = service_process("trainer", settings, folder / run_id, threads=fair_threads(1))
    with Supervisor() as supervisor:
        supervisor.add(spec)
        supervisor.wait_ready(spec.name)
        yield spec.address, lambda: supervisor.wait_ready(spec.name)

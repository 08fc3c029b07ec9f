"""`trimtab rounds`: the loop over SFT, rankings, reward model and PPO, from a recipe; and where such a run stands."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="rounds",
    help="Rounds of sampling, ranking, reward model and PPO from one recipe; killed anywhere, they go on.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Place(StrEnum):
    """Where a run's services are."""

    LOCAL = "local"
    KUBERNETES = "kubernetes"


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; docs/rounds.md describes it.")],
    folder: Annotated[Path | None, typer.Option(help="Where all of the run lies; runs/NAME by default.")] = None,
    until: Annotated[str | None, typer.Option(metavar="ROUND/STAGE", help="Stop behind this stage.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait for rankings; with --no-wait exit 1 where some are missing.")] = True,
    assignments: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting.")] = None,
    on: Annotated[Place, typer.Option(help="Where services and training run.")] = Place.LOCAL,
    store: Annotated[
        str | None, typer.Option(envvar="TRIMTAB_STORE", help="On kubernetes: URL of the version store.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(envvar="TRIMTAB_DATA", help="On kubernetes: URL under which training data is put.")
    ] = None,
    namespace: Annotated[str, typer.Option(help="On kubernetes: whose services; this pod's by default.")] = "",
    share_gpus: Annotated[
        bool, typer.Option(help="On kubernetes: model services lend their GPUs while SFT and reward model train.")
    ] = False,
) -> None:
    """Run a recipe's rounds; the same command again goes on where the last one stopped or was killed."""
    from rich.console import Console

    from trimtab.cli.settings import merged, parse_assignments, read_yaml
    from trimtab.cli.signals import sigterm_interrupts
    from trimtab.cli.stage_config import stage_config
    from trimtab.cli.watch_run import RunWatcher
    from trimtab.rounds.recipe import parse_recipe
    from trimtab.rounds.run import OnCluster, run_rounds
    from trimtab.rounds.stages.context import StageConfigs

    values = merged(read_yaml(recipe), parse_assignments(assignments or []))
    parsed = parse_recipe(values, str(recipe)).resolved(recipe.resolve().parent)
    sections = {"sft": parsed.sft, "reward": parsed.reward, "ppo": parsed.ppo.settings}
    configs = {name: stage_config(name, settings, f"{recipe}: {name}") for name, settings in sections.items()}
    cluster = None
    if on is Place.KUBERNETES:
        if not store or not data:
            raise typer.BadParameter("--on kubernetes needs --store and --data, URLs of an object store")
        cluster = OnCluster(store, data, namespace, share_gpus)
    console = Console(highlight=False)

    def watch(address: str, stage: str, run_id: str, config: object) -> None:
        RunWatcher(address, stage, run_id, config, None).run()  # type: ignore[arg-type]

    with sigterm_interrupts():
        page = run_rounds(
            parsed,
            StageConfigs(**configs),  # type: ignore[arg-type]
            folder or Path("runs") / parsed.name,
            cores=len(os.sched_getaffinity(0)),
            watch=watch,
            say=lambda text: console.print(text, soft_wrap=True, markup=False),
            wait=wait,
            until=until,
            cluster=cluster,
        )
    if page is not None:
        console.print(f"report  {page}", soft_wrap=True)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say where a run stands: every stage, what it waits for, its figures, and the best policy so far."""
    import json
    from dataclasses import asdict

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from trimtab.rounds.status import read_status

    now = read_status(folder)
    if as_json:
        typer.echo(json.dumps(asdict(now), default=str))
        return
    table = Table("stage", "state", "seconds", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in now.stages:
        table.add_row(stage.name, stage.state, "" if stage.seconds is None else f"{stage.seconds:.0f}", stage.detail)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=160)
    console.print(f"{now.name} in {now.folder}: {now.state}" + (f"; best policy {now.best}" if now.best else ""))
    console.print(table)

"""`trimtab demo`: the whole method on the small story model, on this machine, with a report at the end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES_HINT = "run it in a clone of the repository, or give --examples its examples folder"


def demo(
    folder: Annotated[Path, typer.Option(help="Where everything the demo makes goes.")] = Path("runs/demo"),
    examples: Annotated[Path, typer.Option(help="The repository's examples folder.")] = Path("examples"),
    seed: Annotated[int, typer.Option(help="Seed of all stages.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Begin anew where the folder holds an earlier demo.")] = False,
) -> None:
    """SFT, reward model and PPO of the small story model as local services, then a report. Minutes on two cores."""
    from rich.console import Console

    from trimtab.cli.errors import CommandError
    from trimtab.cli.settings import read_yaml
    from trimtab.cli.signals import sigterm_interrupts
    from trimtab.cli.stage_config import stage_config
    from trimtab.cli.watch_run import RunWatcher
    from trimtab.rounds.demo.contents import write_demo_report
    from trimtab.rounds.demo.run import Demo, DemoRecipes
    from trimtab.rounds.launchers.local import Supervisor

    recipes = examples / "demo"
    if not recipes.is_dir():
        raise CommandError(f"{recipes} is not there; {EXAMPLES_HINT}")
    if folder.exists() and any(folder.iterdir()):
        if not fresh:
            raise CommandError(f"{folder} holds an earlier demo; use --fresh to begin anew, or another --folder")
        shutil.rmtree(folder)
    configs = {
        name: stage_config(name, {"model": "-"} | read_yaml(recipes / f"{name}.yaml"), str(recipes / f"{name}.yaml"))
        for name in ("sft", "reward", "ppo")
    }
    console = Console(highlight=False)

    def watch(address: str, stage: str, run_id: str, config: object) -> None:
        console.print(f"\n{run_id}", style="bold")
        RunWatcher(address, stage, run_id, config, None).run()  # type: ignore[arg-type]

    with sigterm_interrupts(), Supervisor() as supervisor:
        result = Demo(
            folder,
            examples,
            DemoRecipes(**configs),  # type: ignore[arg-type]
            seed=seed,
            cores=len(os.sched_getaffinity(0)),
            watch=watch,
            say=lambda text: console.print(text, soft_wrap=True),
        ).run(supervisor)
    console.print(write_demo_report(result), soft_wrap=True)

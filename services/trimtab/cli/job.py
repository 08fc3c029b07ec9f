"""`trimtab job`: a trainer as a batch job, which ends when its run has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def job(
    config: Annotated[Path, typer.Option(help="YAML file of the trainer's settings.")],
    run: Annotated[Path | None, typer.Option(help="File of the run; without it the trainer waits for runs.")] = None,
    torchrun: Annotated[str, typer.Option(help="torchrun's arguments, for a run of several processes.")] = "",
) -> None:
    """Run a trainer until its run has ended: exit 0, 1 failed, 42 wrong settings, 143 interrupted (it can resume)."""
    from trimtab.rounds.launchers.trainer_job import WRONG_SETTINGS, RunFile, RunFileError, TrainerJob
    from trimtab.runtime.config import ConfigError, load_config
    from trimtab.trainer.config import TrainerConfig

    try:
        settings = load_config(TrainerConfig, config)
        held = RunFile.load(run) if run else None
        if held is not None:
            _ = held.message
    except (ConfigError, RunFileError) as error:
        typer.echo(f"trimtab: {error}", err=True)
        raise typer.Exit(WRONG_SETTINGS) from error
    rank = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
    raise typer.Exit(TrainerJob(settings, config, held, torchrun, rank).execute())

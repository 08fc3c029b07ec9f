"""A run's stage as all ranks of a trainer do it: rank 0 names the run, each rank runs the stage, all meet at the end.

Ranks other than 0 serve nothing: `follow` is their whole life. A rank that goes astray ends its process, and torchrun
starts all of them anew; the run then goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.runtime.logs import configure_logs, get_logger
from trimtab.trainer.config import DEFAULT_STORE, TrainerConfig
from trimtab.trainer.context import StageContext
from trimtab.trainer.ppo.loop import run_ppo
from trimtab.trainer.ranks import Ranks, RanksApartError
from trimtab.trainer.reward_model import run_reward_model
from trimtab.trainer.run import Run, StopRun
from trimtab.trainer.sft import run_sft
from trimtab.trainer.stages import Stage
from trimtab.weights.lease import Lease
from trimtab.weights.store import Store, open_store

log = get_logger(__name__)

STAGES: dict[str, Callable[[Any, StageContext], None]] = {
    "sft": run_sft,
    "reward_model": run_reward_model,
    "ppo": run_ppo,
}
STAGE_NAMES = {"sft": "sft", "reward_model": "reward", "ppo": "ppo"}


@dataclass(frozen=True)
class Task:
    """One run."""

    run_id: str
    kind: str
    stage: Stage


def stage_context(config: TrainerConfig, store: Store, run: Run, lease: Lease | None, ranks: Ranks) -> StageContext:
    """What a stage gets, on any rank."""
    return StageContext(
        run=run,
        store=store,
        lease=lease,
        folder=config.folder / run.snapshot.run_id,
        device=config.device if ranks.world == 1 else ranks.device,
        threads=config.compute_threads,
        keep_versions=config.keep_versions,
        full_version_every=config.full_version_every,
        services=config.services.options(),
        ranks=ranks,
    )


def lead(task: Task, context: StageContext) -> None:
    """Run the stage, the other ranks with it. Raises what the stage raises, RanksApartError where one is lost."""
    context.ranks.told(lambda: task)
    try:
        STAGES[task.kind](task.stage, context)
    except Exception as failure:
        try:
            context.ranks.meet()
        except RanksApartError:  # it failed here alone: nobody else will say why
            log.error("run failed", run_id=task.run_id, rank=context.ranks.rank, exc_info=failure)
            raise
        raise
    context.ranks.meet()


def follow(config: TrainerConfig, ranks: Ranks) -> int:
    """Run what rank 0 runs until it is done with us; returns the exit code. Rank 0 alone heeds SIGTERM, and tells."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logs(config.log_level, config.log_format)
    store = open_store(config.store or DEFAULT_STORE)
    log.info("following", rank=ranks.rank, ranks=ranks.world)
    try:
        while (task := hear(ranks)) is not None:
            context = stage_context(config, store, Run(task.run_id, STAGE_NAMES[task.kind]), None, ranks)
            try:
                STAGES[task.kind](task.stage, context)
            except StopRun:
                pass
            except Exception as error:
                log.error("run failed", run_id=task.run_id, rank=ranks.rank, exc_info=error)
            ranks.meet()
    except (RanksApartError, RuntimeError) as error:
        part(ranks, error)
    ranks.leave()
    return 0


def hear(ranks: Ranks) -> Task | None:
    """The next run that rank 0 names; None where it goes."""
    return ranks.told(lambda: None)


def dismiss(ranks: Ranks) -> None:
    """Let the other ranks go, and part from them."""
    if ranks.world > 1:
        ranks.told(lambda: None)
        ranks.leave()


def part(ranks: Ranks, error: Exception) -> None:
    """End this process, as the ranks cannot go on together: torchrun starts them anew."""
    log.error("the ranks have lost each other; this one ends, for torchrun to start all anew", rank=ranks.rank)
    log.error(str(error))
    os._exit(1)

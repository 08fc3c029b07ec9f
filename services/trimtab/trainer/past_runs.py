"""Runs of before this process, as their folders and the store tell, for those who look at them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from trimtab.trainer.context import published_before
from trimtab.trainer.durable import RunLockedError, held
from trimtab.trainer.metrics import reported
from trimtab.trainer.run import Run, RunState
from trimtab.trainer.run_record import RunFolder
from trimtab.trainer.work import STAGE_NAMES
from trimtab.weights.store import Store

NOT_ENDED = "it has not ended: start it again, as it was, and it goes on"


def past_run(run_id: str, folder: Path, store: Store) -> Run | None:
    """The run of `folder` as it ended, or stopped where it was cut off; None where there is none to be read.

    Not where another process works on it: that one tells more.
    """
    state_folder = RunFolder(folder)
    try:
        record, outcome = state_folder.record(), state_folder.outcome()
        if record is None:
            return None
        with held(state_folder.lock):
            steps = reported(folder)
    except (RunLockedError, FileNotFoundError, ValueError):  # a run that never took a step may be discarded meanwhile
        return None
    run = Run(run_id, STAGE_NAMES[record.kind])
    run.plan(steps[-1].step if steps else 0)
    run.recall(steps, published_before(run_id, store))
    if outcome is None:
        run.finish(RunState.STOPPED, NOT_ENDED)
    else:
        run.finish(RunState[outcome.upper()])
    return run


def past_run_ids(folder: Path) -> list[str]:
    """Runs that were started below `folder`, the newest first."""
    begun: dict[str, int] = {}
    for path in folder.glob("*/state/run.json"):
        with suppress(FileNotFoundError):  # discarded meanwhile
            begun[path.parent.parent.name] = path.stat().st_mtime_ns
    return sorted(begun, key=lambda run_id: begun[run_id], reverse=True)

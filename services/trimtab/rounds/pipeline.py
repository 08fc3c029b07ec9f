"""Runs stages in their order against a journal: what is done is passed over, what was cut off is started again.

Knows nothing of what a stage does. A stage gets the number of its attempt, so that what an earlier attempt left behind
(a training run under its own name) never meets what this one makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.rounds.journal import Journal, StageResult

MAX_ATTEMPTS_IN_A_ROW = 3


class StageInterrupted(RuntimeError):
    """A stage lost something that comes back by itself (a service that died): it may be tried again."""


@dataclass(frozen=True)
class Stage:
    """`name` is "ROUND/STAGE"; `run(attempt)` does the work and returns what to record."""

    name: str
    run: Callable[[int], StageResult]


def run_stages(
    stages: Sequence[Stage], journal: Journal, say: Callable[[str], None], *, until: str | None = None
) -> None:
    """Run what is not done yet, up to and with `until`; an exception of a stage is recorded and raised."""
    for stage in stages:
        if journal.done(stage.name) is None:
            _run(stage, journal, say)
        if stage.name == until:
            return


def _run(stage: Stage, journal: Journal, say: Callable[[str], None]) -> None:
    for left in reversed(range(MAX_ATTEMPTS_IN_A_ROW)):
        attempt = journal.start(stage.name)
        say(f"{stage.name}" + (f", attempt {attempt}" if attempt > 1 else ""))
        try:
            result = stage.run(attempt)
        except Exception as error:
            journal.fail(stage.name, " ".join(str(error).split()) or type(error).__name__)
            if isinstance(error, StageInterrupted) and left:
                say(f"{stage.name}: {error}; it is tried again")
                continue
            raise
        journal.complete(stage.name, attempt, result)
        return

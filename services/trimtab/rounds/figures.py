"""The figures of every round so far, read from the journal and the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.rounds.evaluate import Interval
from trimtab.rounds.journal import Journal
from trimtab.rounds.stages.evaluation import Point, read_points


@dataclass(frozen=True)
class RoundFigures:
    """One round as the report shows it. Round 0 is SFT; it has one point.

    Attributes:
        points: the evaluated versions by step; best: the place of the one that stands for the round.
        reward_accuracy: of the round's reward model on held-out rankings, None where it was not measured.
        against_previous: how often the judge prefers it to the round before.
    """

    number: int
    points: tuple[Point, ...]
    best: int
    seconds: float
    rankings: int
    reward_accuracy: float | None
    against_previous: Interval | None

    @property
    def chosen(self) -> Point:
        """The version that stands for the round."""
        return self.points[self.best]


def read_rounds(folder: Path, journal: Journal) -> list[RoundFigures]:
    """The figures of every published round, in order."""
    rounds = []
    number = 0
    while journal.done(f"{number}/publish"):
        points, page = read_points(folder, number)
        own = [event for event in journal.events if event.stage.partition("/")[0] == str(number)]
        reward, rank = journal.done(f"{number}/reward"), journal.done(f"{number}/rank")
        rounds.append(
            RoundFigures(
                number=number,
                points=tuple(points),
                best=[point.version for point in points].index(page["best"]),
                seconds=_seconds(own),
                rankings=int(rank.metrics["rankings"]) if rank else 0,
                reward_accuracy=reward.metrics.get("validation_pair_accuracy") if reward else None,
                against_previous=Interval(**page["against_previous"]) if page["against_previous"] else None,
            )
        )
        number += 1
    return rounds


def _seconds(events: Sequence) -> float:
    """Time at work: from each start to the event that ended it; what a kill cut off does not count."""
    total, started = 0.0, None
    for event in events:
        if event.event == "started":
            started = event.at
        elif event.event in ("done", "failed") and started is not None:
            total, started = total + (event.at - started).total_seconds(), None
    return total

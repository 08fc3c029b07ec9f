"""Which policy version people prefer, from any campaign whose tasks hold answers of several versions.

A task is the unit: its win rate is the mean over its judgments and pairs, a tie counts half, and two equal answers are
a tie that nobody was asked about. The 95 % interval is a percentile bootstrap over tasks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from trimtab.labeling.tables import Campaign, Judgment, Task
from trimtab.labeling.vocabulary import TaskState

BOOTSTRAP_DRAWS = 4000
DRAWS_AT_ONCE = 200


@dataclass(frozen=True)
class WinRate:
    """How often `challenger` is preferred to `base`, with its 95 % interval.

    `wins`, `ties` and `losses` count single judgments of pairs; `identical` the tasks whose answers were equal.
    """

    base: str
    challenger: str
    rate: float
    low: float
    high: float
    tasks: int
    wins: int
    ties: int
    losses: int
    identical: int


def win_rates(session: Session, campaign: Campaign) -> list[WinRate]:
    """Of each version against each version before it in name, over all judged tasks."""
    outcomes: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    identical: dict[tuple[str, str], int] = defaultdict(int)
    for task, judgments in _judged(session, campaign):
        if task.state == TaskState.IDENTICAL:
            pair = sorted(response.version for response in task.responses)
            outcomes[pair[0], pair[1]][task.id].append(0.5)
            identical[pair[0], pair[1]] += 1
        for judgment in judgments:
            for base, challenger in product(task.responses, task.responses):
                if base.version < challenger.version:
                    difference = judgment.ranks[base.position] - judgment.ranks[challenger.position]
                    score = 0.5 if difference == 0 else float(difference > 0)
                    outcomes[base.version, challenger.version][task.id].append(score)
    return [_win_rate(pair, by_task, identical[pair]) for pair, by_task in sorted(outcomes.items())]


def _win_rate(pair: tuple[str, str], by_task: dict[int, list[float]], identical: int) -> WinRate:
    scores = np.array([np.mean(values) for values in by_task.values()])
    single = [value for values in by_task.values() for value in values]
    low, high = _interval(scores)
    return WinRate(
        base=pair[0],
        challenger=pair[1],
        rate=float(scores.mean()),
        low=low,
        high=high,
        tasks=len(scores),
        wins=single.count(1.0),
        ties=single.count(0.5) - identical,
        losses=single.count(0.0),
        identical=identical,
    )


def _interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    means = np.empty(BOOTSTRAP_DRAWS)
    for start in range(0, BOOTSTRAP_DRAWS, DRAWS_AT_ONCE):  # bounded memory for many tasks
        drawn = generator.integers(0, len(values), size=(DRAWS_AT_ONCE, len(values)))
        means[start : start + DRAWS_AT_ONCE] = values[drawn].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _judged(session: Session, campaign: Campaign) -> list[tuple[Task, list[Judgment]]]:
    tasks = session.scalars(
        select(Task)
        .where(Task.campaign_id == campaign.id)
        .where((Task.judgment_count > 0) | (Task.state == TaskState.IDENTICAL))
        .options(selectinload(Task.responses))
    ).all()
    judgments: dict[int, list[Judgment]] = defaultdict(list)
    for judgment in session.scalars(
        select(Judgment)
        .join(Task, Judgment.task_id == Task.id)
        .where(Task.campaign_id == campaign.id, ~Judgment.is_adjudication)
    ):
        judgments[judgment.task_id].append(judgment)
    return [(task, judgments[task.id]) for task in tasks]

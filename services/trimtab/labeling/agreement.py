"""How far people agree: pairwise, and Krippendorff's alpha. Plain numbers in, plain numbers out.

A ranking of K responses is K·(K−1)/2 statements about pairs. Pairwise agreement is the share of the pairs that two
people both put in an order on which they put it in the same order (InstructGPT reports 73 to 77 %); a pair that either
of them tied is counted apart. Alpha corrects for chance and takes any number of people a task: 1 is perfect, 0 chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np

Ranks = Sequence[int]


@dataclass(frozen=True)
class PairCounts:
    """Pairs of responses that two people judged: same order, opposite order, tied by both, tied by one of them."""

    same: int = 0
    opposite: int = 0
    both_tied: int = 0
    one_tied: int = 0

    @property
    def share(self) -> float | None:
        """Same order among the pairs that both ordered; None where there are none."""
        ordered = self.same + self.opposite
        return self.same / ordered if ordered else None

    @property
    def total(self) -> int:
        return self.same + self.opposite + self.both_tied + self.one_tied

    @property
    def distance(self) -> float:
        """0 for equal rankings, 1 for reversed ones: opposite pairs, and half of those that one person tied."""
        return (self.opposite + 0.5 * self.one_tied) / self.total if self.total else 0.0

    def plus(self, other: PairCounts) -> PairCounts:
        return PairCounts(
            self.same + other.same,
            self.opposite + other.opposite,
            self.both_tied + other.both_tied,
            self.one_tied + other.one_tied,
        )


def compare_rankings(first: Ranks, second: Ranks) -> PairCounts:
    """The pairs of two rankings of the same responses."""
    counts = [0, 0, 0, 0]
    for i, j in combinations(range(len(first)), 2):
        a, b = _sign(first[i] - first[j]), _sign(second[i] - second[j])
        if a and b:
            counts[0 if a == b else 1] += 1
        else:
            counts[2 if a == b else 3] += 1
    return PairCounts(*counts)


@dataclass(frozen=True)
class Agreement:
    """Agreement over tasks that several people judged.

    Attributes:
        pairs: over all pairs of people who judged the same task.
        rank_alpha, rating_alpha: ordinal alpha of ranks within a task, and of 1–7 ratings; None with too little data.
        by_labeler: each person against all others.
        shared_tasks: tasks that at least two people judged.
    """

    pairs: PairCounts
    rank_alpha: float | None
    rating_alpha: float | None
    by_labeler: dict[str, PairCounts]
    shared_tasks: int


@dataclass(frozen=True)
class Judged:
    """One person's ranks and ratings of one task, in the order of its responses."""

    task: Hashable
    labeler: str
    ranks: tuple[int, ...]
    ratings: tuple[int | None, ...] = ()


def agreement(judged: Iterable[Judged]) -> Agreement:
    """Agreement of all judgments given; a labeler counts once a task."""
    tasks: dict[Hashable, list[Judged]] = defaultdict(list)
    for one in judged:
        tasks[one.task].append(one)
    shared = [group for group in tasks.values() if len(group) > 1]
    total, by_labeler = PairCounts(), defaultdict(PairCounts)
    for group in shared:
        for first, second in combinations(group, 2):
            counts = compare_rankings(first.ranks, second.ranks)
            total = total.plus(counts)
            for labeler in (first.labeler, second.labeler):
                by_labeler[labeler] = by_labeler[labeler].plus(counts)
    ranks = [[one.ranks[i] for one in group] for group in shared for i in range(len(group[0].ranks))]
    ratings = [[one.ratings[i] for one in group] for group in shared for i in range(_rated(group))]
    return Agreement(total, ordinal_alpha(ranks), ordinal_alpha(ratings), dict(by_labeler), len(shared))


def disagreement(group: Sequence[Judged]) -> float:
    """0 where all rankings of one task are equal, up to 1 where two are reversed: the mean over pairs of people."""
    distances = [compare_rankings(a.ranks, b.ranks).distance for a, b in combinations(group, 2)]
    return float(np.mean(distances)) if distances else 0.0


def ordinal_alpha(units: Iterable[Sequence[int | None]]) -> float | None:
    """Krippendorff's alpha for ordinal data (Krippendorff 2011, "Computing Krippendorff's alpha-reliability").

    `units` holds for each thing that was judged the values it got, None for a missing one. None where no unit has two
    values, or where all values are equal, so that nothing could have been told apart.
    """
    values = [[value for value in unit if value is not None] for unit in units]
    values = [unit for unit in values if len(unit) > 1]
    domain = sorted({value for unit in values for value in unit})
    if len(domain) < 2:
        return None
    column = {value: i for i, value in enumerate(domain)}
    counts_UV = np.zeros((len(values), len(domain)), np.int64)
    for row, unit in enumerate(values):
        for value in unit:
            counts_UV[row, column[value]] += 1
    return float(krippendorff.alpha(value_counts=counts_UV, value_domain=domain, level_of_measurement="ordinal"))


def _rated(group: Sequence[Judged]) -> int:
    return min(len(one.ratings) for one in group)


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)

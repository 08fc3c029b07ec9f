"""A simulated labeler: orders answers by a gold score that noise spoils. For demos and tests; nobody real is behind it.

Its rankings are drawn from the Plackett–Luce model of the gold scores: Gumbel noise of scale s on each score, then
sorted, puts answer i before j with probability σ((g_i − g_j) / s) (Yellott 1977). A ranking depends on the gold scores,
the seed, the set's name and the labeler's number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3

from trimtab.rounds.ranking.source import AnswerSet, Collected, RankedSet
from trimtab.rounds.scorers import Scorer

LABELER = "simulated"


class SimulatedLabeler:
    """`labelers` simulated labelers who each rank every set; they are named simulated-1, simulated-2, …"""

    poll_s = 0.0

    def __init__(self, gold: Scorer, *, noise: float, tie_within: float, labelers: int, seed: int) -> None:
        self.inputs = {"simulated labeler's gold score": gold.spec}
        self._gold = gold
        self._noise = noise
        self._tie_within = tie_within
        self._labelers = labelers
        self._seed = seed

    def offer(self, sets: Sequence[AnswerSet], offered: Path) -> None:
        """Nobody has to be told."""

    def poll(self, sets: Sequence[AnswerSet]) -> Collected:
        """All rankings at once."""
        prompts = [answers.prompt for answers in sets for _ in answers.responses]
        gold_B = self._gold.score(prompts, [text for answers in sets for text in answers.responses])
        rankings, start = [], 0
        for answers in sets:
            gold_K = gold_B[start : start + len(answers.responses)]
            start += len(answers.responses)
            for number in range(1, self._labelers + 1):
                rankings.append(RankedSet(answers, self._ranks(answers.task, number, gold_K), f"{LABELER}-{number}"))
        return Collected(tuple(rankings))

    def _ranks(self, task: str, number: int, gold_K: np.ndarray) -> tuple[int, ...]:
        digest = blake3(f"{self._seed}/{task}/{number}".encode()).digest(8)
        chance = np.random.default_rng(int.from_bytes(digest, "little"))
        noisy_K = gold_K + self._noise * chance.gumbel(size=len(gold_K))
        return ranks_with_ties(noisy_K, self._tie_within)


def ranks_with_ties(scores_K: np.ndarray, within: float) -> tuple[int, ...]:
    """1 for the highest score. From the top down, a score within `within` of the best of its rank shares that rank.

    Equal scores tie even at 0.
    """
    ranks = [0] * len(scores_K)
    best = rank = 0.0
    for place, index in enumerate(np.argsort(-scores_K, kind="stable"), start=1):
        if place == 1 or best - scores_K[index] > within:
            best, rank = float(scores_K[index]), place
        ranks[index] = int(rank)
    return tuple(ranks)

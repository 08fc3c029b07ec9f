"""What a comparison of two models is asked, and what came out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.rounds.evaluate import Interval, distinct_n_in_groups, words
from trimtab.rounds.scorers import WirePrompt
from trimtab_client import Sampling


class DuelError(ValueError):
    """The two cannot be compared as asked; the message says what to change."""


@dataclass(frozen=True)
class DuelPlan:
    """What to compare.

    Attributes:
        judge: a scorer (`scorers`), "people:FILE" (rankings of the pairs in to_rank.jsonl), or
            "people:https://HOST:PORT/c/NAME": a campaign of the labeling page (over http:// only on this machine), made
            where it is not there.
        folder: gets the answers, the pairs and the services' logs.
        token_file: a lead's access token for that page.
    """

    first: str
    second: str
    prompts: tuple[WirePrompt, ...]
    judge: str
    sampling: Sampling
    folder: Path
    store: str
    threads: int
    token_file: Path | None = None


@dataclass(frozen=True)
class Side:
    """What one model answered: `texts[p][s]` is sample s to prompt p.

    Attributes:
        served: the version or source that the generator named.
        tokens: of each answer, [P, S]; ended: which ended by themselves.
        scores_PS: the judge's; None where people judge.
    """

    source: str
    served: str
    texts: tuple[tuple[str, ...], ...]
    tokens_PS: np.ndarray
    ended_PS: np.ndarray
    scores_PS: np.ndarray | None = None

    @property
    def distinct_2(self) -> float:
        """Share of distinct word pairs in 16 answers to different prompts, averaged."""
        return distinct_n_in_groups([words(row[0]) for row in self.texts], 2)


@dataclass(frozen=True)
class Duel:
    """The result. `win_rate` is how often the second's answer is preferred, a tie counting half.

    Attributes:
        wins_P: the same for each prompt that was judged.
        difference: mean of the judge's score, second less first; None where people judge.
    """

    plan: DuelPlan
    first: Side
    second: Side
    win_rate: Interval
    wins_P: np.ndarray
    difference: Interval | None

"""The comparisons of the reward-training benchmark as one file that both sides read: sets of K token sequences, ranked.

Each set is one prompt and K responses to it in a strict order, so it holds K·(K−1)/2 comparisons. A step's are
those of `sets_per_step` sets in the file's order; sets are written for as many steps as asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.models import SPECIAL_TOKENS, Work, WorkFolder

EOS_ID = SPECIAL_TOKENS.index("<eos>")


@dataclass(frozen=True)
class RankingWork:
    """Size of the comparisons; a response's tokens include its end token."""

    responses: int = 9
    sets_per_step: int = 8
    steps: int = 6

    @property
    def pairs_per_step(self) -> int:
        return self.sets_per_step * self.responses * (self.responses - 1) // 2


def write_rankings(path: Path, work: Work, rankings: RankingWork) -> Path:
    """Rows {"prompt_length": int, "sequences": K lists of ids, best first}, from the work's seed."""
    rng = np.random.default_rng(work.seed + 3)
    with path.open("w") as file:
        for _ in range(rankings.steps * rankings.sets_per_step):
            prompt = rng.integers(len(SPECIAL_TOKENS), work.vocab_size, work.prompt_tokens).tolist()
            words_KT = rng.integers(
                len(SPECIAL_TOKENS), work.vocab_size, (rankings.responses, work.response_tokens - 1)
            )
            sequences = [[*prompt, *words, EOS_ID] for words in words_KT.tolist()]
            file.write(json.dumps({"prompt_length": len(prompt), "sequences": sequences}) + "\n")
    return path


@dataclass(frozen=True)
class TrainingRun:
    """What one run of a side measured.

    Attributes:
        step_seconds: of each measured optimizer step (the first is left out).
        first_loss: mean −log σ(r_w − r_l) of the first step's comparisons, before any step: the same on every side.
    """

    side: str
    step_seconds: tuple[float, ...]
    first_loss: float
    cores_used: float
    peak_rss_mb: float


@dataclass(frozen=True)
class TrainingCase:
    """What a side is asked for: its folders and comparisons, the dtype of its compute, its cores."""

    folder: WorkFolder
    comparisons: Path
    rankings: RankingWork
    dtype: str
    threads: int

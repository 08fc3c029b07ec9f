"""What every side of the generation benchmark is asked for: requests of random tokens as a file, one file a case."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.models import SPECIAL_TOKENS, Work

CASES = ("even 16", "even 64", "ragged")


@dataclass(frozen=True)
class Requests:
    """One case: at most `slots` sequences at a time; lengths in tokens."""

    slots: int
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: tuple[int, ...]

    @property
    def total_new_tokens(self) -> int:
        """What a side has to sample."""
        return sum(self.new_tokens)


def requests_of(case: str, work: Work) -> Requests:
    """even B: B prompts of 32 tokens, 64 new ones each. ragged: 96 of 8-32, 8-120 new ones, through 16 slots."""
    rng = np.random.default_rng(work.seed + 3)
    if case == "ragged":
        lengths, new = rng.integers(8, 33, 96), rng.integers(8, 121, 96)
        slots = 16
    else:
        slots = int(case.split()[1])
        lengths, new = np.full(slots, work.prompt_tokens), np.full(slots, work.response_tokens)
    prompts = [rng.integers(len(SPECIAL_TOKENS), work.vocab_size, length).tolist() for length in lengths]
    return Requests(slots, tuple(map(tuple, prompts)), tuple(new.tolist()))


def write_requests(path: Path, requests: Requests) -> Path:
    """As the peers read it."""
    path.write_text(json.dumps(vars(requests)))
    return path


def read_requests(path: Path) -> Requests:
    """What `write_requests` wrote."""
    found = json.loads(path.read_text())
    return Requests(found["slots"], tuple(map(tuple, found["prompts"])), tuple(found["new_tokens"]))

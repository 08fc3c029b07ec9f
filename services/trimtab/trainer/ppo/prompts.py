"""The prompt sampler: shuffled passes over a data set, with its own RNG and a state that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from blake3 import blake3

Item = TypeVar("Item")


class Sampler(Generic[Item]):
    """Draws items without replacement; each pass over the data is a fresh permutation."""

    def __init__(self, items: Sequence[Item], seed: int | Sequence[int]) -> None:
        self._items = items
        self._random = np.random.default_rng(seed)
        self._queue: list[int] = []

    def draw(self, count: int) -> list[Item]:
        """The next `count` items."""
        while len(self._queue) < count:
            self._queue += self._random.permutation(len(self._items)).tolist()
        drawn, self._queue = self._queue[:count], self._queue[count:]
        return [self._items[i] for i in drawn]

    def state_dict(self) -> dict[str, Any]:
        """RNG and what is left of the pass."""
        return {"random": self._random.bit_generator.state, "queue": list(self._queue)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._random.bit_generator.state = state["random"]
        self._queue = list(state["queue"])


def completion_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """hash(run seed, step, prompt, sample): 64 bits that do not depend on the order of anything."""
    digest = blake3(np.array([run_seed, step, prompt, sample], dtype="<u8").tobytes()).digest(8)
    return int.from_bytes(digest, "little")

"""The prompt sampler: shuffled passes over a data set, with its own RNG and a state that a checkpoint can keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from blake3 import blake3


class PromptSampler:
    """Draws prompts without replacement; each pass over the data is a fresh permutation."""

    def __init__(self, prompts: Sequence[np.ndarray], seed: int) -> None:
        self._prompts = prompts
        self._random = np.random.default_rng(seed)
        self._queue: list[int] = []

    def draw(self, count: int) -> list[np.ndarray]:
        """The next `count` prompts, int32 ids."""
        while len(self._queue) < count:
            self._queue += self._random.permutation(len(self._prompts)).tolist()
        drawn, self._queue = self._queue[:count], self._queue[count:]
        return [self._prompts[i] for i in drawn]

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

"""The order of rows in SFT and reward-model training: shuffled epochs, known from the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EpochOrder:
    """`epochs` passes over `rows` rows in batches, each a fresh permutation; the last batch of one may be short."""

    rows: int
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def batches(self, done_steps: int = 0) -> Iterator[tuple[int, list[int]]]:
        """(step, the rows of its batch) behind the steps already done; steps count from 0."""
        order = np.random.default_rng(self.seed)
        for epoch in range(self.epochs):
            permutation = order.permutation(self.rows)
            for number in range(self.steps_per_epoch):
                step = epoch * self.steps_per_epoch + number
                if step >= done_steps:
                    start = number * self.batch_size
                    yield step, permutation[start : start + self.batch_size].tolist()

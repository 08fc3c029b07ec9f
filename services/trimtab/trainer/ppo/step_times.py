"""Where a step's time went: seconds, tokens a second and the share of the step that each stage was waited for."""

from __future__ import annotations

import time

import torch

from trimtab.trainer.ppo.batches import RolloutClocks


class StepTimes:
    """A stopwatch of one step, which begins when it is made; its methods are called in this order."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    def collected(self, clocks: RolloutClocks) -> None:
        """The batch is there."""
        self._collected = time.perf_counter()
        self._clocks = clocks

    def valued(self) -> None:
        """Old log-probs, values and advantages are there."""
        self._valued = time.perf_counter()

    def trained(self) -> None:
        """The weights have moved."""
        self._trained = time.perf_counter()

    def published(self) -> None:
        """The version is published, and served where the next step needs that."""
        self._published = time.perf_counter()

    def metrics(self, lengths_B: torch.Tensor) -> dict[str, float]:
        """By the names of docs/metrics.md. A service is waited for from the step's start, or the end of the one before
        it, to its own end: what it did while the step before trained costs nothing."""
        total = self._published - self._started
        clocks = self._clocks
        seconds = {
            "generate": clocks.generate.busy_s,
            "score": clocks.score.busy_s,
            "reference": clocks.reference.busy_s,
            "values": self._valued - self._collected,
            "train": self._trained - self._valued,
            "publish": self._published - self._trained,
        }
        sampled = max(self._started, clocks.generate.ended_at)
        waits = seconds | {
            "generate": sampled - self._started,
            "score": max(0.0, clocks.score.ended_at - sampled),
            "reference": max(0.0, clocks.reference.ended_at - sampled),
        }
        tokens = float(lengths_B.sum())
        return (
            {"seconds_step": total}
            | {f"seconds_{name}": value for name, value in seconds.items()}
            | {f"tokens_per_second_{name}": tokens / max(value, 1e-9) for name, value in seconds.items()}
            | {f"wait_share_{name}": value / total for name, value in waits.items()}
        )

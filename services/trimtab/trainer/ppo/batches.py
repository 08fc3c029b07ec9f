"""A step's batch on its way: its prompts, the episodes that are there so far, and what is still to be sampled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.trainer.ppo.experience import Episode


@dataclass
class StageClock:
    """When a service had work of this batch, on `time.perf_counter`; calls at the same time count once."""

    busy_s: float = 0.0
    ended_at: float = 0.0
    _calls: int = 0
    _began: float = 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a call is under way."""
        if not self._calls:
            self._began = time.perf_counter()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self.busy_s += time.perf_counter() - self._began


@dataclass
class RolloutClocks:
    """One clock a service."""

    generate: StageClock = field(default_factory=StageClock)
    score: StageClock = field(default_factory=StageClock)
    reference: StageClock = field(default_factory=StageClock)


@dataclass(frozen=True)
class Request:
    """Samples of a batch that one call asks for: equally many of each of its prompts."""

    prompts: tuple[int, ...]
    samples: tuple[tuple[int, ...], ...]


@dataclass
class Batch:
    """The episodes of one step.

    Attributes:
        step: the step that trains on them; strictly on-policy they are sampled by version `step` − 1.
        prompts: int32 ids, each sampled `samples` times.
        sampler_state: the prompt sampler's, after these were drawn.
        trace: the span that the batch began under, for what happens to it later; None untraced.
        episodes: by index (prompt · samples + sample), each as soon as its completion is there.
    """

    step: int
    prompts: Sequence[np.ndarray]
    samples: int
    sampler_state: dict[str, Any]
    episodes: dict[int, Episode] = field(default_factory=dict)
    clocks: RolloutClocks = field(default_factory=RolloutClocks)
    trace: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What other ranks are told of it: not the span, which is of this process."""
        return self.__dict__ | {"trace": None}

    def __len__(self) -> int:
        return len(self.prompts) * self.samples

    @property
    def whole(self) -> bool:
        """Whether every episode is there with its score and its reference log-probs."""
        return len(self.episodes) == len(self) and all(episode.complete for episode in self.episodes.values())

    @property
    def in_order(self) -> list[Episode]:
        """All episodes by index, however they arrived."""
        return [self.episodes[index] for index in range(len(self))]

    def missing(self) -> list[Request]:
        """What is still to be sampled: prompts of which all is missing together, single samples of the others."""
        lacks = {
            p: tuple(k for k in range(self.samples) if p * self.samples + k not in self.episodes)
            for p in range(len(self.prompts))
        }
        untouched = tuple(p for p, samples in lacks.items() if len(samples) == self.samples)
        single = [(p, k) for p, samples in lacks.items() if len(samples) < self.samples for k in samples]
        requests = []
        if untouched:
            requests.append(Request(untouched, tuple(lacks[p] for p in untouched)))
        if single:
            requests.append(Request(tuple(p for p, _ in single), tuple((k,) for _, k in single)))
        return requests

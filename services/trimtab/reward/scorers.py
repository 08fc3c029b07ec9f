"""What a named scorer is, and what it answers. `model_scorer`, `rule_scorer` and `sum_scorer` are the three kinds.

Suffix: B sequences of a request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from trimtab.runtime.errors import deadline_exceeded, precondition
from trimtab.runtime.model_service import matches
from trimtab_client.v1 import model_pb2, reward_pb2
from trimtab_client.versions import ModelVersion


@dataclass(frozen=True, eq=False)
class Part:
    """One scorer's share of a weighted sum; `scores_B` as they entered it."""

    scorer: str
    weight: float
    scores_B: np.ndarray
    version: ModelVersion


@dataclass(frozen=True, eq=False)
class Scored:
    """Raw and normalised scores, float32 [B], all finite, and who made them; `cut`: which sequences were cut."""

    scores_B: np.ndarray
    normalized_B: np.ndarray
    version: ModelVersion
    cut: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()


class NamedScorer(Protocol):
    """A scorer of a reward server."""

    name: str

    async def score(
        self, request: reward_pb2.ScoreRequest, pin: model_pb2.VersionPin | None, deadline: float | None
    ) -> Scored:
        """Score a request's input. `deadline` in `time.monotonic()` seconds. Raises ServiceError."""
        ...

    def info(self) -> model_pb2.ScorerInfo:
        """What GetModel says of it."""
        ...


@asynccontextmanager
async def within(name: str, timeout_s: float, deadline: float | None) -> AsyncIterator[float]:
    """Give up what happens inside after `timeout_s`; yields the deadline that then holds (`time.monotonic()` seconds).

    DEADLINE_EXCEEDED naming the scorer.
    """
    own = time.monotonic() + timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            yield own if deadline is None else min(own, deadline)
    except TimeoutError:
        raise deadline_exceeded(f"scorer {name} took longer than its time-out of {timeout_s:g} s") from None


def check_pin(pin: model_pb2.VersionPin | None, version: ModelVersion) -> None:
    """FAILED_PRECONDITION unless the pin, if there is one, is satisfied by a version that has no successors."""
    rule = pin.WhichOneof("rule") if pin is not None else None
    if pin is None or rule is None:
        return
    exact = ModelVersion.from_proto(pin.exact)
    if rule != "exact" or not matches(exact, version):
        raise precondition(
            f"version: this is {version}, {version.digest}; pins of steps are for models", field="version"
        )

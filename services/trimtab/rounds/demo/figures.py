"""What the demo measured, as its report lays it out: stages, policies, accuracies, samples, versions, promises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trimtab.rounds.evaluate import Interval, KlSummary, TextSummary


@dataclass(frozen=True)
class StageSeries:
    """A stage's metrics by step: `values[name][i]` belongs to `steps[i]`; NaN where a step did not have it."""

    stage: str
    steps: np.ndarray
    values: dict[str, np.ndarray]

    @classmethod
    def from_rows(cls, stage: str, rows: Sequence[tuple[int, dict[str, float]]]) -> StageSeries:
        """From (step, metrics) rows, such as the Watch stream sends."""
        names = dict.fromkeys(name for _, values in rows for name in values)
        columns = {name: np.array([values.get(name, np.nan) for _, values in rows], np.float64) for name in names}
        return cls(stage, np.array([step for step, _ in rows], np.int64), columns)

    @classmethod
    def from_jsonl(cls, stage: str, file: Path) -> StageSeries:
        """From the metrics.jsonl that the trainer writes."""
        rows = []
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((row["step"], {name: value for name, value in row.items() if isinstance(value, float)}))
        return cls.from_rows(stage, rows)


@dataclass(frozen=True)
class PolicyFigures:
    """One policy on the held-out openings. `judge_PS`: the judge's probability that a response is positive, P openings
    by S samples; `gold_PS` the same of a second, less independent score, or None."""

    name: str
    judge_PS: np.ndarray
    texts: TextSummary
    gold_PS: np.ndarray | None = None


@dataclass(frozen=True)
class Comparison:
    """The trained policy against the one it started from."""

    before: PolicyFigures
    after: PolicyFigures
    win_rate: Interval
    kl: KlSummary
    judge: str
    gold: str = ""


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy of the reward model on one kind of rankings, over `pairs` untied pairs."""

    name: str
    interval: Interval
    pairs: int


@dataclass(frozen=True)
class Sample:
    """One opening with a response of each policy and the judge's probabilities of them."""

    opening: str
    before: str
    after: str
    judge_before: float
    judge_after: float


@dataclass(frozen=True)
class PublishedVersion:
    """A checkpoint in the store, and what it is."""

    version: str
    digest: str
    note: str


@dataclass(frozen=True)
class Bar:
    """A promise, what was measured, and whether it held."""

    promise: str
    measured: str
    held: bool


@dataclass(frozen=True)
class DemoReport:
    """Everything the report shows. `facts` and `timings` are (name, text) and (stage, seconds)."""

    title: str
    facts: tuple[tuple[str, str], ...]
    timings: tuple[tuple[str, float], ...]
    sft: StageSeries
    reward: StageSeries
    ppo: StageSeries
    accuracies: tuple[Accuracy, ...]
    rater_agreement: Interval
    comparison: Comparison
    samples: tuple[Sample, ...]
    versions: tuple[PublishedVersion, ...]
    bars: tuple[Bar, ...] = field(default=())


def bars_of(
    comparison: Comparison, *, max_kl_per_40_tokens: float = 10.0, min_distinct_2: float = 0.7
) -> tuple[Bar, ...]:
    """The example's promises held against what was measured."""
    openings = len(comparison.before.judge_PS)
    kl = comparison.kl.k1_per_40_tokens
    before, after = comparison.before.texts.distinct_2, comparison.after.texts.distinct_2
    return (
        Bar("at least 200 held-out openings", f"{openings}", openings >= 200),
        Bar(
            f"the judge prefers {comparison.after.name}: 95 % interval above 50 %",
            comparison.win_rate.percent(),
            comparison.win_rate.low > 0.5,
        ),
        Bar(f"KL at most {max_kl_per_40_tokens:g} nats per 40 tokens", kl.plain(), kl.value <= max_kl_per_40_tokens),
        Bar(f"distinct-2 at least {min_distinct_2:.2f}", f"{after:.3f}", after >= min_distinct_2),
        Bar(
            f"distinct-2 at least 0.8 of {comparison.before.name}'s",
            f"{after:.3f} against {before:.3f}",
            after >= 0.8 * before,
        ),
    )

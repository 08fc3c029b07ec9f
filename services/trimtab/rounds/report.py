"""The report of a round: report.md with its plots, from numbers that others measured.

Nothing is computed here that is not laid out: `evaluate` made the numbers, the trainer its metrics, `plots` draws.
The folder holds everything the page shows, so it can be copied as it is; report.json holds the numbers for programs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from trimtab.rounds.evaluate import Interval, KlSummary, TextSummary
from trimtab.rounds.markdown import quoted, table


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
class RoundReport:
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


def write_report(report: RoundReport, folder: Path) -> Path:
    """Write report.md, report.json and the PNGs into `folder`; returns the path of report.md."""
    from trimtab.rounds.plots import draw_curves, draw_judge, draw_reward_model

    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(report, folder / "curves.png")
    draw_judge(report, folder / "judge.png")
    draw_reward_model(report, folder / "reward_model.png")
    (folder / "report.json").write_text(json.dumps(_numbers(report), indent=1) + "\n", encoding="utf-8")
    page = folder / "report.md"
    page.write_text(_page(report), encoding="utf-8")
    return page


def _page(report: RoundReport) -> str:
    comparison = report.comparison
    return (
        "\n\n".join(
            [
                f"# {report.title}",
                table(("", ""), report.facts),
                "## Did it work?",
                table(
                    ("promise", "measured", "held"),
                    [(b.promise, b.measured, "yes" if b.held else "**no**") for b in report.bars],
                ),
                f"![The judge before and after](judge.png)\n\nThe judge: {comparison.judge}. Training never saw it.",
                _policies(comparison),
                "## Training",
                "![Loss, reward and KL by step](curves.png)",
                "## Reward model",
                "![Accuracy beside the raters' own agreement](reward_model.png)",
                _accuracies(report),
                "## Samples",
                "Held-out openings, one response of each policy, drawn without looking; "
                "in brackets the judge's probability that the text is positive.",
                *(_sample(sample, comparison) for sample in report.samples),
                "## Checkpoints",
                table(
                    ("version", "digest", "what it is"),
                    [(f"`{v.version}`", f"`{v.digest[:23]}`", v.note) for v in report.versions],
                ),
                "## Time",
                table(("stage", "seconds"), [(name, f"{seconds:.0f}") for name, seconds in report.timings]),
            ]
        )
        + "\n"
    )


def _policies(comparison: Comparison) -> str:
    before, after = comparison.before, comparison.after
    rows = [
        ("the judge prefers it", "", comparison.win_rate.percent()),
        ("judge: probability of positive, mean", f"{before.judge_PS.mean():.3f}", f"{after.judge_PS.mean():.3f}"),
    ]
    if before.gold_PS is not None and after.gold_PS is not None:
        rows.append((f"{comparison.gold}, mean", f"{before.gold_PS.mean():.3f}", f"{after.gold_PS.mean():.3f}"))
    texts = (before.texts, after.texts)
    rows += [
        ("KL from the reference, nats per 40 tokens (k1)", "0", comparison.kl.k1_per_40_tokens.plain()),
        ("KL from the reference, nats a response (k1)", "0", comparison.kl.k1_per_response.plain()),
        ("KL from the reference, nats a response (k3)", "0", comparison.kl.k3_per_response.plain()),
        ("distinct-1, words of 16 responses", *(f"{text.distinct_1:.3f}" for text in texts)),
        ("distinct-2, words of 16 responses", *(f"{text.distinct_2:.3f}" for text in texts)),
        ("length, tokens", *(text.tokens_mean.plain(1) for text in texts)),
        ("ended by themselves", *(f"{100 * text.ended_share:.0f} %" for text in texts)),
        ("perplexity under the reference, a token", *(f"{text.perplexity:.2f}" for text in texts)),
    ]
    openings, samples = after.judge_PS.shape
    note = (
        f"\n\n{openings} held-out openings, {samples} responses each; intervals are 95 %, bootstrapped over openings."
    )
    return table(("", before.name, after.name), rows) + note


def _accuracies(report: RoundReport) -> str:
    rows = [(accuracy.name, accuracy.interval.percent(), f"{accuracy.pairs:,}") for accuracy in report.accuracies]
    rows.append(("one rater against the mean of the others", report.rater_agreement.percent(), ""))
    return table(("held-out pairs ordered as people do", "share (95 % interval)", "untied pairs"), rows)


def _sample(sample: Sample, comparison: Comparison) -> str:
    lines = [
        f"> **{quoted(sample.opening)}**",
        f"> *{comparison.before.name}* ({sample.judge_before:.2f}): {quoted(sample.before)}",
        f"> *{comparison.after.name}* ({sample.judge_after:.2f}): {quoted(sample.after)}",
    ]
    return "\n>\n".join(lines)


def _numbers(report: RoundReport) -> dict:
    comparison = report.comparison
    return {
        "title": report.title,
        "facts": dict(report.facts),
        "seconds": dict(report.timings),
        "bars": [asdict(bar) for bar in report.bars],
        "win_rate": asdict(comparison.win_rate),
        "kl": asdict(comparison.kl),
        "policies": {
            figures.name: asdict(figures.texts)
            | {"judge_mean": float(figures.judge_PS.mean())}
            | ({"gold_mean": float(figures.gold_PS.mean())} if figures.gold_PS is not None else {})
            for figures in (comparison.before, comparison.after)
        },
        "reward_accuracy": [asdict(accuracy) for accuracy in report.accuracies],
        "rater_agreement": asdict(report.rater_agreement),
        "versions": [asdict(version) for version in report.versions],
        "samples": [asdict(sample) for sample in report.samples],
    }

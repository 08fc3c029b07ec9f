"""The demo's figures laid out for `report`: what was promised, what came out, where it lies."""

from __future__ import annotations

import json

from trimtab.rounds.demo.comparison import Samples
from trimtab.rounds.demo.figures import (
    Comparison,
    DemoReport,
    PolicyFigures,
    PublishedVersion,
    Sample,
    StageSeries,
    bars_of,
)
from trimtab.rounds.demo.report import write_report
from trimtab.rounds.demo.run import DemoResult
from trimtab.rounds.evaluate import Interval

SAMPLES_SHOWN = 8
JUDGE = "logistic regression on all-MiniLM-L6-v2 sentence vectors, fitted to critics' labels of other sentences"


def write_demo_report(result: DemoResult) -> str:
    """Write report.md with its plots into the demo's folder; returns the lines that end the demo."""
    report = demo_report(result)
    page = write_report(report, result.folder / "report")
    held = [f"  {'held' if bar.held else 'NOT HELD'}: {bar.promise}: {bar.measured}" for bar in report.bars]
    sample = report.samples[0]
    return "\n".join(
        [
            "",
            *held,
            "",
            f"  {sample.opening}",
            f"  SFT: {' '.join(sample.before.split())}",
            f"  PPO: {' '.join(sample.after.split())}",
            "",
            f"report       {page}",
            f"checkpoints  {result.store}  (trimtab versions list --store {result.store})",
            f"metrics      tensorboard --logdir {result.folder / 'runs'}",
            f"your turn    trimtab label --demo {result.folder}  (rank this policy's answers on the labeling page)",
        ]
    )


def demo_report(result: DemoResult) -> DemoReport:
    """All that the page shows."""
    agreement = json.loads((result.folder / "data" / "manifest.json").read_text())["rater_agreement"]
    runs = result.folder / "runs"
    comparison = Comparison(
        before=_figures("SFT", result.comparison.base),
        after=_figures("PPO", result.comparison.challenger),
        win_rate=result.comparison.win_rate,
        kl=result.comparison.challenger.kl,
        judge=f"{JUDGE} (cross-validated accuracy {result.judge_accuracy:.3f})",
    )
    return DemoReport(
        title="trimtab demo: a story model that people's ratings made more cheerful",
        facts=(
            ("policy", "stories260K, 260,032 parameters"),
            ("seed", str(result.seed)),
            ("minutes", f"{sum(result.seconds.values()) / 60:.1f}"),
            ("store", str(result.store)),
        ),
        timings=tuple(result.seconds.items()),
        sft=StageSeries.from_jsonl("sft", runs / "demo-sft" / "metrics.jsonl"),
        reward=StageSeries.from_jsonl("reward", runs / "demo-reward" / "metrics.jsonl"),
        ppo=StageSeries.from_jsonl("ppo", runs / "demo-ppo" / "metrics.jsonl"),
        accuracies=result.accuracies,
        rater_agreement=Interval(agreement["share"], agreement["low"], agreement["high"]),
        comparison=comparison,
        samples=_samples(result.comparison.base, result.comparison.challenger),
        versions=tuple(
            PublishedVersion(str(version), version.digest, note)
            for version, note in (
                (result.sft, "SFT policy, the reference of PPO"),
                (result.reward, "reward model; the value model started from it"),
                (result.policy, "PPO policy"),
            )
        ),
        bars=bars_of(comparison),
    )


def _figures(name: str, samples: Samples) -> PolicyFigures:
    return PolicyFigures(name, samples.probabilities_PS, samples.text)


def _samples(base: Samples, challenger: Samples) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            opening=base.openings[i],
            before=base.texts[i][0],
            after=challenger.texts[i][0],
            judge_before=float(base.probabilities_PS[i, 0]),
            judge_after=float(challenger.probabilities_PS[i, 0]),
        )
        for i in range(0, len(base.openings), max(1, len(base.openings) // SAMPLES_SHOWN))
    )[:SAMPLES_SHOWN]

"""The demo's report: report.md with its plots, from numbers that others measured.

Nothing is computed here that is not laid out: `evaluate` made the numbers, the trainer its metrics, `plots` draws.
The folder holds everything the page shows, so it can be copied as it is; report.json holds the numbers for programs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from trimtab.rounds.demo.figures import (
    Comparison,
    DemoReport,
    Sample,
)
from trimtab.rounds.markdown import quoted, table


def write_report(report: DemoReport, folder: Path) -> Path:
    """Write report.md, report.json and the PNGs into `folder`; returns the path of report.md."""
    from trimtab.rounds.demo.plots import draw_curves, draw_judge, draw_reward_model

    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(report, folder / "curves.png")
    draw_judge(report, folder / "judge.png")
    draw_reward_model(report, folder / "reward_model.png")
    (folder / "report.json").write_text(json.dumps(_numbers(report), indent=1) + "\n", encoding="utf-8")
    page = folder / "report.md"
    page.write_text(_page(report), encoding="utf-8")
    return page


def _page(report: DemoReport) -> str:
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


def _accuracies(report: DemoReport) -> str:
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


def _numbers(report: DemoReport) -> dict:
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

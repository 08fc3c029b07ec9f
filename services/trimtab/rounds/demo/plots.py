"""The report's pictures, drawn with matplotlib. Each function writes one PNG of what `report` hands it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from trimtab.rounds.demo.figures import DemoReport, StageSeries
from trimtab.rounds.plot_style import ACCENT, AFTER, BEFORE, QUIET, STYLE


def draw_curves(report: DemoReport, file: Path) -> None:
    """SFT loss, reward-model loss, PPO reward, PPO's KL, by step."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained")
        _line(axes[0, 0], report.sft, "loss", BEFORE, "SFT: loss", "nats a token")
        _points(axes[0, 0], report.sft, "validation_loss", ACCENT, "held-out")
        _line(axes[0, 1], report.reward, "loss", BEFORE, "Reward model: loss", "mean over pairs")
        axes[0, 1].axhline(np.log(2), color=QUIET, linestyle="--", linewidth=1)
        axes[0, 1].text(0.99, np.log(2), "chance", color=BEFORE, ha="right", va="bottom", transform=_right(axes[0, 1]))
        _line(axes[1, 0], report.ppo, "normalized_score_mean", AFTER, "PPO: reward", "normalised score")
        _line(
            axes[1, 1], report.ppo, "kl_nats_per_sequence", ACCENT, "PPO: KL from the reference", "nats a response (k1)"
        )
        figure.savefig(file)
        plt.close(figure)


def draw_judge(report: DemoReport, file: Path) -> None:
    """The judge's probabilities before and after, and the win rate with its interval."""
    comparison = report.comparison
    before, after = comparison.before, comparison.after
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=[1.7, 1])
        bins = np.linspace(0, 1, 26)
        for figures, color in ((before, BEFORE), (after, AFTER)):
            values = figures.judge_PS.ravel()
            weights = np.full(values.size, 100 / values.size)
            left.hist(
                values,
                bins,
                weights=weights,
                color=color,
                alpha=0.55,
                label=f"{figures.name}, mean {values.mean():.2f}",
            )
            left.axvline(values.mean(), color=color, linewidth=1.5)
        left.set(title="What the judge thinks", xlabel="probability that the text is positive", ylabel="% of responses")
        left.set_xlim(0, 1)
        left.legend(loc="upper left")
        rate = comparison.win_rate
        spread = [[100 * (rate.value - rate.low)], [100 * (rate.high - rate.value)]]
        right.axhline(50, color=ACCENT, linestyle="--", linewidth=1)
        right.text(0.99, 51, "no difference", color=ACCENT, ha="right", transform=_right(right), fontsize=8)
        right.bar([0], [100 * rate.value], width=0.5, color=AFTER)
        right.errorbar([0], [100 * rate.value], yerr=spread, color="#1f2937", capsize=5, linewidth=1.3)
        right.text(0, 100 * rate.high + 2, f"{100 * rate.value:.1f} %", ha="center", fontweight="bold")
        right.set(
            title=f"{after.name} preferred over {before.name}", ylabel="% of pairs", ylim=(0, 105), xlim=(-0.6, 0.6)
        )
        right.set_xticks([])
        figure.savefig(file)
        plt.close(figure)


def draw_reward_model(report: DemoReport, file: Path) -> None:
    """Held-out accuracy by kind of ranking, with intervals, beside how well one rater knows the others."""
    agreement = report.rater_agreement
    with plt.rc_context(STYLE):
        height = 1.7 + 0.5 * len(report.accuracies)
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        names = [accuracy.name for accuracy in report.accuracies]
        for row, accuracy in enumerate(report.accuracies):
            rate = accuracy.interval
            axes.plot(
                [100 * rate.low, 100 * rate.high],
                [row, row],
                color=AFTER,
                linewidth=5,
                alpha=0.35,
                solid_capstyle="round",
            )
            axes.plot([100 * rate.value], [row], "o", color=AFTER, markersize=7)
            axes.annotate(
                f"{100 * rate.value:.1f} %", (100 * rate.value, row), (0, 8), textcoords="offset points", ha="center"
            )
        axes.axvspan(100 * agreement.low, 100 * agreement.high, color=ACCENT, alpha=0.15, linewidth=0)
        axes.axvline(
            100 * agreement.value, color=ACCENT, linewidth=1.2, label="one rater against the mean of the others"
        )
        axes.axvline(50, color=BEFORE, linestyle="--", linewidth=1, label="chance")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.7)
        axes.set_xlim(45, 100)
        axes.set(title="Reward model: held-out pairs ordered as people do", xlabel="% of untied pairs, 95 % interval")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower right", ncols=2)
        figure.savefig(file)
        plt.close(figure)


def _line(axes: Any, series: StageSeries, name: str, color: str, title: str, unit: str) -> None:
    axes.set(title=title, ylabel=unit, xlabel="step")
    values = series.values.get(name)
    if values is None:
        axes.text(0.5, 0.5, f"no metric {name}", ha="center", transform=axes.transAxes, color=BEFORE)
        return
    there = np.isfinite(values)
    steps, values = series.steps[there], values[there]
    window = max(1, len(values) // 25)
    axes.plot(steps, values, color=color, alpha=0.3 if window > 1 else 1.0, linewidth=1 if window > 1 else 1.8)
    if window > 1:
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=color, linewidth=1.8)


def _points(axes: Any, series: StageSeries, name: str, color: str, label: str) -> None:
    values = series.values.get(name)
    if values is not None and np.isfinite(values).any():
        there = np.isfinite(values)
        axes.plot(series.steps[there], values[there], "o-", color=color, markersize=4, linewidth=1.2, label=label)
        axes.legend()


def _right(axes: Any) -> Any:
    """x as a share of the axes, y in the data's units."""
    return axes.get_yaxis_transform()

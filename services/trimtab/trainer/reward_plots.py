"""The plots of a reward model's report: calibration, and score against length."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np

from trimtab.trainer.reward_report import Accuracy, HeldOutScores, RewardReport

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "0.55"
LENGTH_BINS = 12
TITLE_SIZE = 8.5


def write_report(report: RewardReport, held_out: HeldOutScores, folder: Path, *, mean: float, std: float) -> None:
    """Write reward_report.json, reward_calibration.png and reward_length.png; scores drawn as (score − mean)/std."""
    (folder / "reward_report.json").write_text(json.dumps(asdict(report), indent=1))
    _figure(folder / "reward_calibration.png", lambda axes: _calibration(axes, report))
    normalized_B = (held_out.scores_B - mean) / std
    _figure(folder / "reward_length.png", lambda axes: _length(axes, report, normalized_B, held_out.response_tokens_B))


def _figure(path: Path, draw: Callable[[Axes], None]) -> None:
    figure, axes = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=GREY)
    draw(axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _calibration(axes: Axes, report: RewardReport) -> None:
    predicted = np.array([one.predicted for one in report.calibration])
    observed = [one.observed for one in report.calibration]
    share = np.array([one.share for one in observed])
    low, high = np.array([one.low for one in observed]), np.array([one.high for one in observed])
    reach = np.maximum([share - low, high - share], 0)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=1, linestyle="--", label="perfectly calibrated")
    axes.errorbar(
        predicted, share, reach, fmt="o", color=BLUE, markersize=5, linewidth=1.2, label="held-out pairs, 95 % interval"
    )
    bottom = min(0.45, float(low.min()) - 0.02)
    axes.set(
        xlabel="predicted probability of the better-scored answer, $\\sigma(r_a - r_b)$",
        ylabel="how often people preferred it",
        xlim=(0.49, 1.01),
        ylim=(bottom, 1.02),
    )
    lines = [f"Pair accuracy {_interval(report.accuracy)}, calibration error {report.calibration_error:.3f}"]
    if report.training_labelers and report.held_out_labelers:
        known, new = _interval(report.training_labelers), _interval(report.held_out_labelers)
        lines.append(f"labelers of the training rows {known}, others {new}")
    axes.set_title("\n".join(lines), fontsize=TITLE_SIZE)
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)


def _interval(accuracy: Accuracy) -> str:
    return f"{accuracy.share:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%})"


def _length(axes: Axes, report: RewardReport, normalized_B: np.ndarray, tokens_B: np.ndarray) -> None:
    alpha = float(np.clip(200 / len(tokens_B), 0.06, 0.6))
    axes.scatter(tokens_B, normalized_B, s=9, color=BLUE, alpha=alpha, linewidths=0, label="held-out answers")
    bins = [members for members in np.array_split(np.argsort(tokens_B, kind="stable"), LENGTH_BINS) if len(members)]
    axes.plot(
        [np.median(tokens_B[members]) for members in bins],
        [np.median(normalized_B[members]) for members in bins],
        color=ORANGE,
        linewidth=2,
        label=f"median of each of {len(bins)} equal parts",
    )
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="length of the answer, tokens", ylabel="normalised score")
    axes.set_title(
        f"Correlation of score and length {report.length_correlation:+.2f}\nthe longer of two answers is preferred by "
        f"people in {report.longer_preferred_by_people:.0%}, by the model in {report.longer_preferred_by_model:.0%}",
        fontsize=TITLE_SIZE,
    )
    legend = axes.legend(loc="lower right", fontsize=8.5, framealpha=0.85, edgecolor="none")
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)

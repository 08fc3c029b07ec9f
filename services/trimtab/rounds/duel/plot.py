"""The picture of a comparison: how often each is preferred, and where that comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from trimtab.rounds.duel.plan import Duel
from trimtab.rounds.plot_style import ACCENT, AFTER, BEFORE, STYLE

INK = "#1f2937"


def draw_duel(duel: Duel, file: Path) -> None:
    """One PNG: the win rate with its interval, and the judge's scores (with people as judge, wins by prompt)."""
    with plt.rc_context(STYLE):
        figure, (top, below) = plt.subplots(2, 1, figsize=(7.2, 4.2), layout="constrained", height_ratios=[1, 2.6])
        _draw_share(top, duel)
        if duel.first.scores_PS is not None and duel.second.scores_PS is not None:
            _draw_scores(below, duel.first.scores_PS.ravel(), duel.second.scores_PS.ravel())
        else:
            below.hist(100 * duel.wins_P, np.linspace(0, 100, 11), color=AFTER, edgecolor="white")
            below.set(title="Prompt by prompt", xlabel="% of the prompt's pairs that B wins", ylabel="prompts")
        figure.savefig(file)
        plt.close(figure)


def _draw_share(axes: Any, duel: Duel) -> None:
    """A bar of 100 %: A from the left, B from the right, the interval where they meet."""
    rate = duel.win_rate
    meet, low, high = (100 * (1 - value) for value in (rate.value, rate.high, rate.low))
    axes.barh([0], [meet], color=BEFORE, height=0.6)
    axes.barh([0], [100 - meet], left=[meet], color=AFTER, height=0.6)
    axes.errorbar([meet], [0], xerr=[[meet - low], [high - meet]], color=INK, capsize=5, linewidth=1.5)
    axes.axvline(50, color=ACCENT, linestyle="--", linewidth=1)
    axes.set(title="Preferred, with the 95 % interval", xlim=(0, 100), xlabel="% of pairs")
    axes.text(0.62, 1.06, f"A {meet:.1f} %", color=BEFORE, fontweight="bold", transform=axes.transAxes)
    axes.text(1, 1.06, f"B {100 - meet:.1f} %", color=AFTER, fontweight="bold", transform=axes.transAxes, ha="right")
    axes.set_yticks([])
    axes.grid(visible=False)


def _draw_scores(axes: Any, first_B: np.ndarray, second_B: np.ndarray) -> None:
    """Both distributions of the judge's score."""
    both = np.concatenate([first_B, second_B])
    bins = np.linspace(both.min(), both.max() + 1e-9, 31)
    for name, values_B, color in (("A", first_B, BEFORE), ("B", second_B, AFTER)):
        weights = np.full(values_B.size, 100 / values_B.size)
        label = f"{name}, mean {values_B.mean():.2f}"
        axes.hist(values_B, bins, weights=weights, color=color, alpha=0.55, label=label)
        axes.axvline(values_B.mean(), color=color, linewidth=1.5)
    axes.set(title="What the judge thinks", xlabel="score", ylabel="% of answers")
    axes.legend(loc="upper left")

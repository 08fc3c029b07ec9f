"""The picture of a run of rounds: the rise over rounds, and every score against KL, where over-optimisation shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from trimtab.rounds.figures import RoundFigures
from trimtab.rounds.plot_style import ACCENT, AFTER, BEFORE, STYLE
from trimtab.rounds.recipe import Recipe
from trimtab.rounds.stages.evaluation import GOLD, JUDGE, REWARD

GOLD_COLOR = "#b45309"
LABELS = {
    JUDGE: "held-out judge",
    GOLD: "gold score behind the simulated labeler",
    REWARD: "the round's own reward model",
}
LOOKS: dict[str, dict[str, Any]] = {
    JUDGE: {"color": AFTER, "linewidth": 2.0, "marker": "o", "markersize": 5},
    GOLD: {"color": GOLD_COLOR, "linewidth": 1.5, "marker": "s", "markersize": 4},
    REWARD: {"color": BEFORE, "linewidth": 1.3, "marker": "^", "markersize": 4, "linestyle": "--"},
}


def draw_rounds(rounds: Sequence[RoundFigures], recipe: Recipe, best_round: int, file: Path) -> None:
    """One PNG: win rate against SFT by round with intervals, and for each round all scores against KL."""
    trained = [figures for figures in rounds if figures.number]
    columns = 1 + len(trained)  # one axis of percent for all
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            columns,
            figsize=(max(8.4, 3.2 + 2.6 * len(trained)), 3.8),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        _draw_rise(axes[0, 0], rounds, best_round)
        reach = 1.08 * max(point.kl.k1_per_response.value for r in trained for point in r.points)
        for place, figures in zip(axes[0, 1:], trained, strict=True):
            _draw_frontier(place, figures, reach, is_best=figures.number == best_round)
        handles, labels = axes[0, 1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(file)
        plt.close(figure)


def _draw_rise(axes: Any, rounds: Sequence[RoundFigures], best_round: int) -> None:
    """The judge's win rate (and the gold score's) of each round's version."""
    numbers = [figures.number for figures in rounds]
    for name in (GOLD, JUDGE):
        if name not in rounds[-1].chosen.wins:
            continue
        wins = [figures.chosen.wins[name] for figures in rounds]
        values = [100 * interval.value for interval in wins]
        spread = [[100 * (w.value - w.low) for w in wins], [100 * (w.high - w.value) for w in wins]]
        axes.errorbar(numbers, values, yerr=spread, capsize=3, **LOOKS[name])
    lowest = min([50.0, *(100 * figures.chosen.wins[JUDGE].low for figures in rounds[1:])])
    best = rounds[best_round]
    axes.annotate(
        "published\nas best",
        (best.number, 100 * best.chosen.wins[JUDGE].low),
        (0, -5),
        textcoords="offset points",
        ha="center",
        va="top",
        color=AFTER,
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=2,
    )
    axes.axhline(50, color=ACCENT, linestyle=":", linewidth=1)
    axes.set(title="Over rounds", xlabel="round", ylabel="% of answers better than SFT's", ylim=(lowest - 9, 102))
    axes.set_xticks(numbers, ["SFT" if number == 0 else str(number) for number in numbers])
    axes.set_xlim(-0.4, numbers[-1] + 0.4)


def _draw_frontier(axes: Any, figures: RoundFigures, reach: float, *, is_best: bool) -> None:
    """Win rates of a round's checkpoints against their KL from SFT, which stands at the origin with 50 %."""
    kl = [0.0, *(point.kl.k1_per_response.value for point in figures.points)]
    for name in (REWARD, GOLD, JUDGE):
        if name in figures.chosen.wins:
            values = [50.0, *(100 * point.wins[name].value for point in figures.points)]
            axes.plot(kl, values, label=LABELS[name], clip_on=False, zorder=3, **LOOKS[name])
    chosen = figures.chosen
    axes.plot(
        [chosen.kl.k1_per_response.value],
        [100 * chosen.wins[JUDGE].value],
        marker="o",
        markersize=11,
        markerfacecolor="none",
        markeredgecolor=AFTER,
        linestyle="none",
        zorder=4,
    )
    axes.axhline(50, color=ACCENT, linestyle=":", linewidth=1)
    axes.set(title=f"Round {figures.number}" + (", the best" if is_best else ""), xlabel="KL from SFT, nats a response")
    axes.set_xlim(0, reach)
    axes.locator_params(axis="x", nbins=5)

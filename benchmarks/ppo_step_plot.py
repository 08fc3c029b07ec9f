"""The plot of `benchmarks.ppo_step`: an update's seconds by stage, both sides of every case one above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.sides import Case

COLOURS = {
    "rollout": "#0f766e",
    "reference and reward": "#a9d3cf",
    "values": "#d9953a",
    "train": "#4a5fa8",
    "publish": "#8a3a78",
    "other": "#c5c9d1",
}


def draw(cases: Sequence[tuple[Case, Mapping[str, Mapping[str, float]]]], path: Path) -> None:
    """`cases` holds, for each case, the seconds by stage of the peer and of ours, in this order."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [(case, side, _parts(stages)) for case, sides in cases for side, stages in sides.items()]
    places = [-(1.25 * (index // 2) + 0.45 * (index % 2)) for index in range(len(rows))]
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.5 * len(rows)), layout="constrained")
    ends = [0.0] * len(rows)
    for stage, colour in COLOURS.items():
        seconds = [stages[stage] for _, _, stages in rows]
        axes.barh(places, seconds, 0.42, left=ends, color=colour, label=stage)
        ends = [end + more for end, more in zip(ends, seconds, strict=True)]
    for index, ((_, _, stages), place, end) in enumerate(zip(rows, places, ends, strict=True)):
        ratio = rows[index - 1][2]["update"] / stages["update"] if index % 2 else None
        label = f" {stages['update']:.1f} s" + (f", {ratio:.2f} times as fast" if ratio else "")
        axes.annotate(label, (end, place), va="center", fontweight="bold" if ratio else "normal", annotation_clip=False)
    axes.set_yticks(places, [f"{_short(case)}   {side}" for case, side, _ in rows])
    axes.set(xlabel="seconds of one PPO update, by stage", xlim=(0, 1.2 * max(ends)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _parts(stages: Mapping[str, float]) -> dict[str, float]:
    """With what is waited for after the last completion as one stage: with us the two services work at once."""
    return {**stages, "reference and reward": stages["experience"] - stages["rollout"]}


def _short(case: Case) -> str:
    return f"{case.dtype}, {'ragged' if case.ragged else 'equal'}"

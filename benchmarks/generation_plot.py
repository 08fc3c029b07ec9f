"""The plot of `benchmarks.generation`: new tokens a second by case and side, a panel a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(results: Sequence[Any], path: Path) -> None:
    """`results` are `generation.Comparison`s, one for each dtype and case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(result.dtype for result in results))
    sides = list(dict.fromkeys(name for result in results for name in result.rates))
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=(4.8 * len(dtypes), 3.2), squeeze=False)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        cases = {result.case: result.rates for result in results if result.dtype == dtype}
        for place, side in enumerate(sides):
            offsets = [index + (place - (len(sides) - 1) / 2) * 0.8 / len(sides) for index in range(len(cases))]
            panel.bar(offsets, [rates.get(side, 0.0) for rates in cases.values()], 0.8 / len(sides), label=side)
        panel.set(xticks=range(len(cases)), xticklabels=list(cases), ylabel="new tokens/s", title=dtype)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

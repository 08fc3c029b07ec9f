"""The plot of `benchmarks.reward_serving`: scores a second by side and number of clients, a panel a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[Any], path: Path) -> None:
    """`rows` are `reward_serving.Row`s, one for each model, side and number of clients."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    sides = list(dict.fromkeys(row.side for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.5 * len(models), 3.2), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        clients = sorted({row.clients for row in rows if row.model == model})
        for place, side in enumerate(sides):
            rates = {row.clients: row.per_second for row in rows if (row.model, row.side) == (model, side)}
            offsets = [index + (place - (len(sides) - 1) / 2) * 0.8 / len(sides) for index in range(len(clients))]
            panel.bar(offsets, [rates.get(count, 0.0) for count in clients], 0.8 / len(sides), label=side)
        panel.set(xticks=range(len(clients)), xticklabels=clients, xlabel="clients", ylabel="scores/s", title=model)
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

"""The colours and the matplotlib style that all of the rooms' pictures share."""

from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

BEFORE, AFTER, ACCENT, QUIET = "#8a94a6", "#0f766e", "#c2410c", "#d6dae2"
STYLE: Any = {  # matplotlib's own type for it is a closed list of keys
    "figure.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3b2",
    "axes.grid": True,
    "grid.color": "#eceff4",
    "axes.axisbelow": True,
    "legend.frameon": False,
}

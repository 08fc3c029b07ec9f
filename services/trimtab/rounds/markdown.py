"""Markdown of the reports: tables, and models' texts that must not be read as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; each cell is put on one line."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(
        lines + ["| " + " | ".join(_flat(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    )


def quoted(text: str) -> str:
    """A model's text on one line, none of it read as Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", _flat(text)).replace("<", "&lt;")


def _flat(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())

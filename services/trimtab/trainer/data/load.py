"""Loaders of the three kinds of rows. Each stops at the first bad row with a DataError that names its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trimtab.trainer.data.errors import DataError, RowError
from trimtab.trainer.data.rows import (
    Demonstration,
    PromptRow,
    Ranking,
    parse_demonstration,
    parse_prompt,
    parse_ranking,
)
from trimtab.trainer.data.source import read_rows

Row = TypeVar("Row", Demonstration, PromptRow, Ranking)


def load_demonstrations(source: str | Path) -> list[Demonstration]:
    """All demonstrations of a file, folder or hub id. Raises DataError at the first bad row, or if there is none."""
    return _load(source, parse_demonstration)


def load_prompts(source: str | Path) -> list[PromptRow]:
    """All prompts of a file, folder or hub id. Raises DataError at the first bad row, or if there is none."""
    return _load(source, parse_prompt)


def load_rankings(source: str | Path) -> list[Ranking]:
    """All rankings of a file, folder or hub id. Raises DataError at the first bad row, or if there is none."""
    return _load(source, parse_ranking)


def _load(source: str | Path, parse: Callable[[dict[str, Any]], Row]) -> list[Row]:
    rows: list[Row] = []
    for raw in read_rows(source):
        try:
            rows.append(parse(raw.fields()))
        except RowError as error:
            raise DataError(raw.path, raw.line, error.field, error.reason) from error
    if not rows:
        raise DataError(str(source), 0, "", "holds no rows")
    return rows

"""The line of a process's log that says why it ended."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
TAIL_BYTES = 16_384
ERROR_LEVELS = frozenset({"error", "critical"})


def last_words(path: Path, start: int = 0) -> str:
    """The last line behind byte `start` that tells most, without colours; "" where there is none.

    That is an error record or a line that is no JSON record (the end of a traceback), whichever is later, else the
    last line: what a server logs of its orderly end after an error does not hide the error.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return telling_line(ANSI.sub("", text).splitlines())


def telling_line(lines: Iterable[str]) -> str:
    """`last_words` of lines that are at hand."""
    lines = [line for line in map(str.strip, lines) if line]
    records = [_record(line) for line in lines]
    for line, record in zip(reversed(lines), reversed(records), strict=True):
        if record is None or record.get("level") in ERROR_LEVELS:
            return _shown(line, record)
    return _shown(lines[-1], records[-1]) if lines else ""


def _record(line: str) -> dict[str, object] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _shown(line: str, record: dict[str, object] | None) -> str:
    if record is None:
        return line
    return ": ".join(str(record[key]) for key in ("event", "error") if record.get(key)) or line

"""Texts and JSON rows that `trimtab generate` and `trimtab score` read from arguments, a file or stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trimtab.cli.errors import CommandError


def read_rows(file: Path | None, plain_key: str | None) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of stdin for None and "-"; a line that is no JSON object is {plain_key: line}.

    Without `plain_key` such a line is a CommandError, as is an input without rows.
    """
    name = "stdin" if file is None or str(file) == "-" else str(file)
    if name == "stdin" and sys.stdin.isatty():
        raise CommandError("give texts as arguments, or JSON lines on stdin or with --file")
    text = sys.stdin.read() if name == "stdin" else Path(name).read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028
        if not line.strip():
            continue
        row = _parse(line) if line.lstrip().startswith("{") else None
        if row is None and plain_key is None:
            raise CommandError(f"{name}, line {number}: not a JSON object")
        rows.append(row if row is not None else {plain_key: line})
    if not rows:
        raise CommandError(f"{name} holds no rows")
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None

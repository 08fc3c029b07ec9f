"""Promises of what is quoted from the log of a process that ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.rounds.launchers.log_tail import last_words

ERROR = '{"event": "cannot serve", "error": "no such folder", "level": "error"}'
DRAINED = '{"event": "drained", "level": "info"}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("first\n\x1b[31mred\x1b[0m line\n\n", "red line"),
        (f"{DRAINED}\n", "drained"),
        (f"{ERROR}\n{DRAINED}\n", "cannot serve: no such folder"),
        (f"{ERROR}\nTraceback:\nOSError: disk full\n{DRAINED}\n", "OSError: disk full"),
        (f"some library warns\n{ERROR}\n{DRAINED}\n", "cannot serve: no such folder"),
    ],
)
def test_the_reason_is_quoted_not_the_orderly_end_after_it(tmp_path: Path, text: str, words: str) -> None:
    log = tmp_path / "x.log"
    log.write_text(text)
    assert last_words(log) == words


def test_an_earlier_life_of_the_process_is_not_quoted(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(f"{ERROR}\n")
    start = log.stat().st_size
    assert last_words(log, start) == ""
    assert last_words(tmp_path / "none.log") == ""

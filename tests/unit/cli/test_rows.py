"""JSON lines on stdin or in a file."""

import json

import pytest

from trimtab.cli.errors import CommandError
from trimtab.cli.rows import read_rows


def test_a_row_ends_at_a_newline_and_at_no_other_character(tmp_path):
    rows = [{"prompt": "one\u2028two\u0085three"}, {"prompt": "four"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8")
    assert read_rows(file, None) == rows


def test_plain_lines_are_rows_where_the_command_says_so(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text('Once upon\n\n{"prompt": "a time"}\n')
    assert read_rows(file, "prompt") == [{"prompt": "Once upon"}, {"prompt": "a time"}]
    with pytest.raises(CommandError, match="line 1: not a JSON object"):
        read_rows(file, None)

"""Training data behind URLs reads as files and folders of this machine do."""

import fsspec
import pytest

from trimtab.trainer.data.errors import DataError
from trimtab.trainer.data.source import read_rows


def test_a_file_and_a_folder_behind_a_url_are_read_in_name_order():
    files = fsspec.filesystem("memory")
    files.pipe_file("/data/b.jsonl", b'{"n": 2}\n{"n": 3}\n')
    files.pipe_file("/data/a.jsonl", b'{"n": 1}\n')
    assert [row.fields()["n"] for row in read_rows("memory://data/b.jsonl")] == [2, 3]
    assert [row.fields()["n"] for row in read_rows("memory://data")] == [1, 2, 3]


def test_what_is_not_there_is_refused_by_its_url():
    with pytest.raises(DataError, match="memory://data/nothing"):
        list(read_rows("memory://data/nothing.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows("nosuchprotocol://x/y.jsonl"))

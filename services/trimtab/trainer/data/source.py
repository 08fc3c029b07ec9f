"""Rows as they lie in files: JSONL (also .gz), Parquet, a folder of these, or a Hugging Face hub id.

Knows lines and bytes, nothing of what a row means; `rows` reads the fields next. Files are streamed, so a set may be
larger than memory until it is parsed.
"""

import gzip
import importlib
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.trainer.data.errors import DataError
from trimtab.trainer.data.remote import is_url, local_copy

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class RawRow:
    """One row, not looked at yet. `content` is a JSON line's bytes, or the fields where the format has types."""

    path: str
    line: int
    content: bytes | dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """The row's fields; raises DataError where the line is not a JSON object in UTF-8."""
        if isinstance(self.content, dict):
            return self.content
        try:
            value = json.loads(self.content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(self.path, self.line, "", f"not UTF-8: byte {error.start} of the line") from error
        except json.JSONDecodeError as error:
            raise DataError(self.path, self.line, "", f"not JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise DataError(self.path, self.line, "", "not usable JSON: nested too deeply") from error
        if not isinstance(value, dict):
            raise DataError(self.path, self.line, "", f"a row is a JSON object, not {type(value).__name__}")
        return value


def read_rows(source: str | Path) -> Iterator[RawRow]:
    """Every row of a file, of a folder's files in name order, or of a hub set (`owner/name` or `owner/name:split`).

    A file or folder may be a URL (s3://, gs://, …).

    Blank lines are passed over but counted, so line numbers are the editor's.
    Raises DataError with line 0 where nothing can be read at all.
    """
    if is_url(str(source)):
        with local_copy(str(source)) as copy:
            yield from read_rows(copy)
        return
    path = Path(source)
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.name.endswith(SUFFIXES))
        if not files:
            raise DataError(str(source), 0, "", f"the folder holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif HUB_ID.fullmatch(str(source)) and not str(source).endswith(SUFFIXES):
        yield from _read_hub(str(source))
    else:
        raise DataError(str(source), 0, "", "no such file or folder")


def _read_file(path: Path) -> Iterator[RawRow]:
    if path.name.endswith(".parquet"):
        yield from _read_parquet(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(path)
    else:
        raise DataError(str(path), 0, "", f"unknown kind of file; expected {', '.join(SUFFIXES)}")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    line = 0
    with path.open("rb") as file, gzip.open(file) if path.name.endswith(".gz") else nullcontext(file) as stream:
        try:
            for line, content in enumerate(stream, start=1):
                if content.strip():
                    yield RawRow(str(path), line, content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(str(path), line + 1, "", f"damaged gzip file: {error}") from error


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    line += 1
                    yield RawRow(str(path), line, _without_nulls(fields))
    except pyarrow.ArrowException as error:
        raise DataError(str(path), line + 1, "", f"not a readable Parquet file: {error}") from error


def _read_hub(source: str) -> Iterator[RawRow]:
    if importlib.util.find_spec("datasets") is None:
        reason = "no such file; reading it as a Hugging Face hub id needs the package: pip install datasets"
        raise DataError(source, 0, "", reason)
    name, _, split = source.partition(":")
    datasets = importlib.import_module("datasets")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for line, fields in enumerate(rows, start=1):
            yield RawRow(source, line, _without_nulls(dict(fields)))
    except (OSError, ValueError) as error:
        raise DataError(source, 0, "", f"the hub set cannot be read: {error}") from error


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """Columnar formats spell an absent field as null."""
    return {name: value for name, value in fields.items() if value is not None}

"""Training data at a URL (s3://, gs://, …): fetched into a temporary folder while it is read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.trainer.data.errors import DataError


def is_url(source: str) -> bool:
    """Whether a source names another file system than this machine's."""
    return "://" in source


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The file, or the folder with its files, behind a URL. DataError where it cannot be read."""
    import fsspec

    with tempfile.TemporaryDirectory(prefix="trimtab-data-") as folder:
        target = Path(folder) / url.rstrip("/").rpartition("/")[2]
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
            if filesystem.isdir(path):
                target.mkdir()
                for file in filesystem.find(path):
                    filesystem.get_file(file, str(target / file.rpartition("/")[2]))
            else:
                filesystem.get_file(path, str(target))
        except FileNotFoundError as error:
            raise DataError(url, 0, "", "no such file or folder") from error
        except Exception as error:  # fsspec's file systems raise their vendors' own classes
            raise DataError(url, 0, "", f"cannot be read: {type(error).__name__}: {error}") from error
        yield target

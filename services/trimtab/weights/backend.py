"""What a store asks of the storage under it. Two kinds answer: a local folder and any other fsspec filesystem.

Paths are relative to the store's root, with '/', and were checked by layout before they come here.
"""

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.weights.errors import StoreError, StoreFullError, StoreUnavailableError
from trimtab.weights.manifest import Manifest

ABSENT = "absent"
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class ChangedMeanwhileError(OSError):
    """A file is not the one whose stamp was given."""


@dataclass(frozen=True)
class PointerMove:
    """The pointer's new bytes, and the stamp of the pointer that they were made from."""

    data: bytes
    stamp: str


class Staged(ABC):
    """A version whose files are all written and still invisible."""

    @abstractmethod
    def commit(self, pointer: PointerMove | None, replacing: str | None = None) -> Manifest:
        """Makes the version visible as a whole, then moves the pointer if one is given; returns what was written.

        ``replacing`` is the stamp of the manifest that it takes the place of. Raises FileExistsError if a version has
        appeared meanwhile, ChangedMeanwhileError if that manifest or the pointer has changed, OSError otherwise.
        """


class Backend(ABC):
    """Storage of one root."""

    url: str

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted, without dot files; empty if there is no such folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """A small file's bytes. Raises FileNotFoundError."""

    @abstractmethod
    def stamp(self, path: str) -> str:
        """Changes whenever the file does, ABSENT without a file; '' where locks keep others out, or nothing can."""

    @abstractmethod
    def write(self, path: str, data: bytes, stamp: str = "") -> None:
        """Replaces a small file in one step: a reader sees the old bytes or the new.

        With a ``stamp`` only if it still is the file's; raises ChangedMeanwhileError otherwise.
        """

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Writes a small file in one step if there is none; raises FileExistsError otherwise."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Removes a small file if it is there."""

    @abstractmethod
    def exclusive(self, model: str) -> AbstractContextManager[None]:
        """Keeps other writers of this model out where the storage can; not reentrant."""

    @abstractmethod
    def stage(self, model: str, source: Path, manifest: Manifest) -> AbstractContextManager[Staged]:
        """Writes the manifest's files from ``source``; leaving the context without a commit removes them again.

        Raises RefusedFileError if a file of ``source`` is no longer what the manifest says.
        """

    @abstractmethod
    def remove_version(self, model: str, folder: str) -> None:
        """Makes a version invisible in one step, then removes its files. Call under ``exclusive``."""

    @abstractmethod
    def local_folder(self, folder: str) -> Path | None:
        """Where a folder of the store lies on this machine, None if it must be downloaded."""

    @abstractmethod
    def download(self, path: str, target: Path) -> None:
        """Copies one file to ``target``, whose folder exists. Raises FileNotFoundError."""


@contextmanager
def storage_errors(doing: str, url: str) -> Iterator[None]:
    """Turns what a filesystem raises while ``doing`` something into StoreFullError or StoreUnavailableError."""
    try:
        yield
    except (StoreError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
        raise  # said already, or a bug that must not look like an outage
    except Exception as error:  # fsspec filesystems raise their vendors' own classes beside OSError
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL:
            raise StoreFullError(f"no space left while {doing} {url}: free some (`trimtab versions prune`)") from error
        raise StoreUnavailableError(f"{type(error).__name__} while {doing} {url}: {error}") from error

"""A file that is read again when it changes; what cannot be read leaves the last good content in force."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from trimtab.runtime.errors import StartError
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int] | None


def stamp_of(path: Path) -> Stamp:
    """What changes when a file is written or replaced (a link's target counts); None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Reloading(Generic[T]):
    """The content of `path` by `read`, which raises StartError: at the first reading to the caller, later to the log.

    `generation` grows with each new content. A look costs one stat.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self._path = path
        self._read = read
        self._stamp = stamp_of(path)
        self._content = read(path)
        self.generation = 0

    def get(self) -> T:
        """The content of now."""
        stamp = stamp_of(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._content = self._read(self._path)
            except StartError as error:
                log.error("keeping what was read before", path=str(self._path), reason=str(error))
            else:
                self.generation += 1
                log.info("file read again", path=str(self._path))
        return self._content

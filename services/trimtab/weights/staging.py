"""Private folders that vanish unless they are moved away, even if their owner is killed.

Each folder has a lock file that its owner holds by flock. A kill releases it, so the next one who comes along
knows that the folder is dead and sweeps it. POSIX only, and only for folders on a local (or NFS) disk.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_LOCK = ".lock"
_LOCK_PATIENCE_S = 60.0


@contextmanager
def locked(area: Path) -> Iterator[None]:
    """Holds the one lock of ``area`` (a folder, made if absent) against other threads and processes. Not reentrant.

    Raises TimeoutError if another holds it for a minute: one that was stopped in the middle, or a disk that hangs.
    """
    area.mkdir(parents=True, exist_ok=True)
    with (area / _LOCK).open("a") as lock:
        _lock_patiently(lock, area)
        yield


def _lock_patiently(lock: TextIO, area: Path) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    pause_s = 0.001
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"another process holds {area / _LOCK} since {_LOCK_PATIENCE_S:g} s: find it with fuser and end it"
                ) from None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)


@contextmanager
def staging_folder(area: Path) -> Iterator[Path]:
    """A new empty folder inside ``area``; what is left of it at the end is removed. Sweeps dead ones first.

    Raises OSError. Takes ``locked(area)`` for a moment at the start.
    """
    folder = area / uuid.uuid4().hex
    lock_path = folder.with_suffix(_LOCK)
    with locked(area):
        sweep(area)
        lock = lock_path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        lock.close()


def discard(area: Path, folder: Path) -> None:
    """Moves ``folder`` into ``area`` in one step, then removes it. Call under ``locked(area)``."""
    grave = area / uuid.uuid4().hex
    folder.rename(grave)
    fsync_folder(folder.parent)
    shutil.rmtree(grave)


def sweep(area: Path) -> None:
    """Removes every folder in ``area`` whose owner is gone. Call under ``locked(area)``."""
    for path in list(area.iterdir()):
        lock_path = path.with_suffix(_LOCK)
        if path.name == _LOCK or _is_held(lock_path):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        lock_path.unlink(missing_ok=True)


def _is_held(lock_path: Path) -> bool:
    try:
        with lock_path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def fsync_folder(folder: Path) -> None:
    """Makes the names inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

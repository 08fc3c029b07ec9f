"""Files that survive a kill and a power cut: written aside, fsynced, renamed, and the folder fsynced.

A reader sees the old file or the new one, never a part. What is in the files is not known here.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ASIDE = ".writing-"


class RunLockedError(Exception):
    """Another process works in the folder; the message says which."""


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file in one step."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any | None:
    """The file's value; None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{ASIDE}{path.name}")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync_folder(path.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make `target`, which must not exist, appear whole: `fill` writes its files into a folder aside."""
    aside = folder_aside(target)
    fill(aside)
    show_folder(aside, target)


def folder_aside(target: Path) -> Path:
    """An empty folder in which to write what shall appear as `target`."""
    aside = target.with_name(f"{ASIDE}{target.name}")
    shutil.rmtree(aside, ignore_errors=True)  # left by a kill
    aside.mkdir(parents=True)
    return aside


def show_folder(aside: Path, target: Path) -> None:
    """Make a folder that was written aside appear as `target`, its files on the disk."""
    for file in aside.iterdir():
        fsync_file(file)
    fsync_folder(aside)
    aside.rename(target)
    fsync_folder(target.parent)


def fsync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when the process ends, however it ends. Raises RunLockedError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunLockedError(f"process {file.read().strip() or '?'} works in {path.parent}") from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield

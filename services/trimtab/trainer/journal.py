"""The journal of a run: records that a resume replays, appended as they come, checksummed, fsynced before they count.

A record has a step, an index in it and a payload of bytes; what the payload means is the writer's business. A torn
tail (the write that a kill cut off) is dropped at the next start; a bad record anywhere else is an error. Checkpoints
end its growth: `forget` drops what lies before one.
"""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from trimtab.trainer.durable import ASIDE, fsync_folder

_HEADER = struct.Struct("<4sqqQ16s")  # mark, step, index, payload bytes, digest of all these and the payload
_MARK = b"ttj1"


class CorruptJournalError(Exception):
    """A record that was whole once is not any more; the message names the file and what to do."""


class Journal:
    """An append-only file of records; thread-safe. Equal (step, index) twice: the later record counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("a+b")
        self._where, end = _scan(self._file, path)
        self._file.truncate(end)
        fsync_folder(path.parent)

    def append(self, step: int, index: int, payload: bytes) -> None:
        """Hand a record to the operating system: it survives a kill of the process, a power cut only after `sync`."""
        with self._lock:
            self._where[step, index] = self._write(self._file, step, index, payload)

    def sync(self) -> None:
        """Wait until all that was appended is on the disk."""
        with self._lock:
            os.fsync(self._file.fileno())

    def steps(self) -> list[int]:
        """Steps with records, ascending."""
        with self._lock:
            return sorted({step for step, _ in self._where})

    def count(self, step: int) -> int:
        """How many records a step has."""
        with self._lock:
            return sum(at == step for at, _ in self._where)

    def read(self, step: int) -> dict[int, bytes]:
        """The payloads of a step's records by index."""
        with self._lock:
            places = {index: place for (at, index), place in self._where.items() if at == step}
            return {index: self._payload(*place) for index, place in sorted(places.items())}

    def forget(self, up_to_step: int) -> None:
        """Drop the records of all steps up to this one, which a checkpoint now holds."""
        with self._lock:
            kept = {key: place for key, place in self._where.items() if key[0] > up_to_step}
            if len(kept) == len(self._where):
                return
            aside = self._path.with_name(f"{ASIDE}{self._path.name}")
            file = aside.open("w+b")
            moved = {key: self._write(file, *key, self._payload(*place)) for key, place in kept.items()}
            os.fsync(file.fileno())
            aside.replace(self._path)
            fsync_folder(self._path.parent)
            self._file.close()
            self._file, self._where = file, moved

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _payload(self, offset: int, size_bytes: int) -> bytes:
        return os.pread(self._file.fileno(), size_bytes, offset)

    @staticmethod
    def _write(file: BinaryIO, step: int, index: int, payload: bytes) -> tuple[int, int]:
        file.seek(0, os.SEEK_END)
        start = file.tell() + _HEADER.size
        file.write(_HEADER.pack(_MARK, step, index, len(payload), _digest(step, index, payload)) + payload)
        file.flush()
        return start, len(payload)


def _scan(file: BinaryIO, path: Path) -> tuple[dict[tuple[int, int], tuple[int, int]], int]:
    """Where each payload is, and where the whole records end."""
    where: dict[tuple[int, int], tuple[int, int]] = {}
    size, position = path.stat().st_size, 0
    file.seek(0)
    while position < size:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            break
        mark, step, index, size_bytes, digest = _HEADER.unpack(head)
        end = position + _HEADER.size + size_bytes
        payload = file.read(size_bytes) if mark == _MARK and end <= size else b""
        if len(payload) < size_bytes or digest != _digest(step, index, payload):
            if _MARK not in file.read():
                break  # nothing was written behind it: a write that was cut off
            raise CorruptJournalError(
                f"{path}: the record at byte {position} is damaged; restore the file. With it removed a run in exact "
                "mode goes on from the last checkpoint; any other would sample steps anew that are published already, "
                "which is refused: give it another run id"
            )
        where[step, index] = (position + _HEADER.size, size_bytes)
        position = end
    return where, position


def _digest(step: int, index: int, payload: bytes) -> bytes:
    hasher = blake3(struct.pack("<qq", step, index))
    hasher.update(payload)
    return hasher.digest(16)

"""The durable state of a run of rounds: one JSONL file, one event a line, each on disk before the next thing happens.

A line that a kill cut off is dropped when the run goes on; any other damage is refused. Reading needs no lock, so
status works while a run is going. Nothing here knows what a stage does.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.rounds.recipe import file_digest
from trimtab.weights.staging import fsync_folder

JOURNAL = "journal.jsonl"
LOCK = "lock"
LOCK_TRIES = 5


class JournalError(RuntimeError):
    """The journal, or a file that it vouches for, is not what it was."""


class FolderBusyError(RuntimeError):
    """Another process is running rounds in the same folder."""


class Event(BaseModel):
    """One line of the journal. `files` maps paths relative to the run's folder to digests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event: Literal["begun", "started", "waiting", "done", "failed"]
    at: datetime
    stage: str = ""
    attempt: int = 0
    detail: str = ""
    inputs: dict[str, str] = {}
    outputs: dict[str, str] = {}
    files: dict[str, str] = {}
    metrics: dict[str, float] = {}
    recipe: dict[str, Any] | None = None
    data: dict[str, str] = {}


@dataclass(frozen=True)
class StageResult:
    """What a stage read, made and measured.

    Attributes:
        inputs, outputs: names to versions or digests.
        files: what it wrote, inside the run's folder; their digests go into the journal.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class Journal:
    """Events of one run. Only the process that holds `exclusive` appends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL
        self.events, self._whole_bytes = _read(self.path)

    @property
    def begun(self) -> Event | None:
        """The first event: the recipe and the digests of its data; None in a new folder."""
        return self.events[0] if self.events else None

    def done(self, stage: str) -> Event | None:
        """The record of a completed stage."""
        return next((event for event in self.events if event.event == "done" and event.stage == stage), None)

    @property
    def newest_stage(self) -> str:
        """The stage that was started last; "" before the first."""
        return next((event.stage for event in reversed(self.events) if event.event == "started"), "")

    def attempts(self, stage: str) -> int:
        """How often a stage was started."""
        return sum(event.event == "started" and event.stage == stage for event in self.events)

    def output(self, stage: str, name: str) -> str:
        """An output of a completed stage."""
        record = self.done(stage)
        assert record is not None, f"{stage} is not done"
        return record.outputs[name]

    def begin(self, recipe: dict[str, Any], data: dict[str, str]) -> None:
        """Write the first event."""
        self._append(Event(event="begun", at=datetime.now(UTC), recipe=recipe, data=data))

    def start(self, stage: str) -> int:
        """Note that a stage is started; returns which attempt it is, from 1."""
        attempt = self.attempts(stage) + 1
        self._append(Event(event="started", at=datetime.now(UTC), stage=stage, attempt=attempt))
        return attempt

    def wait(self, stage: str, detail: str) -> None:
        """Note what a stage waits for."""
        self._append(Event(event="waiting", at=datetime.now(UTC), stage=stage, detail=detail))

    def fail(self, stage: str, detail: str) -> None:
        """Note that an attempt ended without result, and why."""
        self._append(Event(event="failed", at=datetime.now(UTC), stage=stage, detail=detail))

    def complete(self, stage: str, attempt: int, result: StageResult) -> None:
        """Acknowledge a stage: its files are made durable first, then the event."""
        files = {}
        for path in result.files:
            _sync(path)
            files[str(path.relative_to(self.folder))] = file_digest(path)
        finite = {name: value for name, value in result.metrics.items() if abs(value) < float("inf")}
        event = Event(
            event="done",
            at=datetime.now(UTC),
            stage=stage,
            attempt=attempt,
            inputs=dict(result.inputs),
            outputs=dict(result.outputs),
            files=files,
            metrics=finite,
        )
        self._append(event)

    def verify_files(self) -> None:
        """Compare every file of every completed stage with its digest; JournalError names the first that differs."""
        for event in self.events:
            for name, digest in event.files.items():
                path = self.folder / name
                if not path.is_file() or file_digest(path) != digest:
                    state = "has changed" if path.is_file() else "is gone"
                    raise JournalError(
                        f"{path} {state} since {event.stage} was completed: put it back, or give a new --folder"
                    )

    def _append(self, event: Event) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        line = event.model_dump_json(exclude_defaults=True).encode() + b"\n"
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            fsync_folder(self.folder)
        self._whole_bytes += len(line)
        self.events.append(event)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes until the end, or the death, of this one; FolderBusyError if held."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        for left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise FolderBusyError(
                        f"another `trimtab rounds run` works in {folder}: wait for it or stop it"
                    ) from None
                time.sleep(0.1)  # a status command holds it for a moment
        yield


def is_running(folder: Path) -> bool:
    """Whether a process holds the folder now."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _read(path: Path) -> tuple[list[Event], int]:
    """Whole events and the bytes they take."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    events = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            events.append(Event.model_validate_json(line))
        except ValidationError as error:
            raise JournalError(f"{path}, line {number} is not an event of a run: give a new --folder") from error
    return events, whole


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fsync_folder(path.parent)

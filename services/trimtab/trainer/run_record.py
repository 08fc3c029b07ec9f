"""What a run is, on disk: its stage and config, where its models came from, how it ended. FOLDER/RUN_ID/state/.

    run.json       the config; each "version:RUN/NAME" with the step it stood for; a digest of each data set
    outcome.json   how it ended; only then there
    checkpoints/   state.Checkpoints        journal    journal.Journal        lock    held by the trainer that works

By this a trainer that starts anew knows a run of before: the same config goes on, another one is refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from trimtab.trainer.durable import RunLockedError, held, read_json, write_json
from trimtab.trainer.run import RunFailedError
from trimtab.trainer.stages import Stage, parse_stage

FORMAT = 1
FREE = frozenset({"generator_address", "reward_address", "reference_address", "service_timeout_s"})
"""Settings of where services are and how long they are waited for: a run may go on with others."""
FREE_OF_THE_STAGE = frozenset({"checkpoint_every_steps"})


class OtherConfigError(Exception):
    """The run id is taken by a run of another config; `field` is the first that differs, as a dotted path."""

    def __init__(self, run_id: str, field: str, theirs: object, ours: object) -> None:
        super().__init__(
            f"run {run_id} was started with {field} {theirs!r}, not {ours!r}; "
            "start it as it was, or take another run id"
        )
        self.field = field


class OtherDataError(RunFailedError):
    """A run goes on, but its data is no longer what it was."""


@dataclass(frozen=True)
class RunRecord:
    """A run's identity.

    Attributes:
        sources: model sources as the config names them, and the versions that they stood for at the start.
        data: digests of the tokens read, by field.
        owner: the name under which whoever holds this folder publishes: a trainer that starts anew after a kill takes
            the run's lease over at once, one with another folder does not.
    """

    kind: str
    stage: Stage
    sources: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)

    def check_same(self, run_id: str, kind: str, stage: Stage) -> None:
        """Raise OtherConfigError unless `stage` is what the run was started with, apart from `FREE`."""
        if kind != self.kind:
            raise OtherConfigError(run_id, "config", self.kind, kind)
        difference = _first_difference(_numbers(self.stage), _numbers(stage))
        if difference is not None:
            field, theirs, ours = difference
            raise OtherConfigError(run_id, f"{kind}.{field}", theirs, ours)


class RunFolder:
    """The state folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    def record(self) -> RunRecord | None:
        """The run that was started here; None for none."""
        row = read_json(self.folder / "run.json")
        if row is None:
            return None
        if row["format"] != FORMAT:
            raise ValueError(f"{self.folder}: a run of format {row['format']}; this trimtab reads {FORMAT}")
        stage = parse_stage(row["kind"], row["config"])
        return RunRecord(row["kind"], stage, row["sources"], row["data"], row["owner"])

    @property
    def is_empty(self) -> bool:
        """Whether no step was taken and no experience kept: such a run may begin anew with another config."""
        files = (self.folder.parent / "metrics.jsonl", self.journal)
        return not self.checkpoints.exists() and not any(file.exists() and file.stat().st_size for file in files)

    def discard(self) -> bool:
        """Forget a run that is empty; False where another process works on it."""
        try:
            with held(self.lock):
                (self.folder / "run.json").unlink(missing_ok=True)
        except RunLockedError:
            return False
        return True

    def begin(self, kind: str, stage: Stage) -> RunRecord:
        """Note that a run starts here, or goes on: it has no outcome any more."""
        (self.folder / "outcome.json").unlink(missing_ok=True)
        record = replace(self.record() or RunRecord(kind, stage), stage=stage)
        self._write(record)
        return record

    def pinned(self, source: str) -> str:
        """The version that a source stood for at the start, or the source itself."""
        return self._begun().sources.get(source, source)

    def pin(self, source: str, version: str) -> None:
        """Note which version a source stands for."""
        record = self._begun()
        if source not in record.sources:
            self._write(replace(record, sources=record.sources | {source: version}))

    def check_data(self, name: str, sequences: Iterable[np.ndarray]) -> None:
        """Note a data set's tokens at the start; raise OtherDataError where a resumed run reads others."""
        hasher = blake3()
        for sequence in sequences:
            hasher.update(len(sequence).to_bytes(8, "little") + sequence.tobytes())
        record, digest = self._begun(), hasher.hexdigest()
        if name not in record.data:
            self._write(replace(record, data=record.data | {name: digest}))
        elif record.data[name] != digest:
            raise OtherDataError(
                f"{name}: it is not what the run was started with; bring that back, or take another run id"
            )

    def _begun(self) -> RunRecord:
        record = self.record()
        assert record is not None, "begin first"
        return record

    def end(self, state: str) -> None:
        """Note how the run ended."""
        write_json(self.folder / "outcome.json", {"state": state})

    def outcome(self) -> str | None:
        """How the run ended, "succeeded" or "stopped"; None where it did not."""
        outcome = read_json(self.folder / "outcome.json")
        return outcome["state"] if outcome is not None else None

    def _write(self, record: RunRecord) -> None:
        row = {
            "format": FORMAT,
            "kind": record.kind,
            "config": record.stage.model_dump(mode="json"),
            "sources": record.sources,
            "data": record.data,
            "owner": record.owner,
        }
        write_json(self.folder / "run.json", row)


def _numbers(stage: Stage) -> dict[str, Any]:
    """The settings that decide what is computed."""
    values = {key: value for key, value in stage.model_dump(mode="json").items() if key not in FREE}
    values["stage"] = {key: value for key, value in values["stage"].items() if key not in FREE_OF_THE_STAGE}
    return values


def _first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, object, object] | None:
    for key in ours:
        mine, other = ours[key], theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            inner = _first_difference(other, mine)
            if inner is not None:
                return f"{key}.{inner[0]}", inner[1], inner[2]
        elif mine != other:
            return key, other, mine
    return None

"""The manifest: what one published version is made of and where it came from. Written last, so it makes the version.

In memory a frozen dataclass; on disk ``manifest.json``, read through pydantic because it may come from anywhere.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.weights.errors import CorruptVersionError, InvalidNameError
from trimtab.weights.layout import check_file_name, check_name, check_step
from trimtab_client import ModelVersion

FORMAT = 1
DELTA_FORMAT = 2  # what a release that knows no deltas must refuse to read
ADAPTER_FORMAT = 3
Kind = Literal["full", "delta", "adapter"]
Digest = Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileEntry:
    """One file of a version: path relative to the version's folder, size and 'blake3:<hex>' of its bytes."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """One published version.

    ``version.digest`` is the digest of the content; ``files`` are sorted by name; ``parent`` names the version this
    one was made from. For ``kind`` 'delta' it is the one to apply it to, whose digest is ``parent_digest``, and
    ``content`` are the files of the plain folder that comes out; for 'adapter' it is the base that its files, a peft
    folder, go with; ``lineage`` says where it came from
    (data, reward version…); ``metrics`` are numbers about it; ``files_folder`` is where the files lie relative to the
    manifest ('' beside it); ``lease_token`` is the lease under which it was to become current, 0 without; ``format`` is
    the number of this layout.
    """

    version: ModelVersion
    files: tuple[FileEntry, ...]
    created_at: datetime
    parent: str | None = None
    lineage: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    kind: Kind = "full"
    files_folder: str = ""
    lease_token: int = 0
    parent_digest: str | None = None
    content: tuple[FileEntry, ...] = ()
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def plain(self) -> "Manifest":
        """The same version as a plain folder has it: the files that a delta is rebuilt to."""
        if self.kind != "delta":
            return self
        return replace(self, kind="full", files=self.content, content=(), format=FORMAT)

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        record = _ManifestRecord(
            format=self.format,
            run_id=self.version.run_id,
            name=self.version.name,
            step=self.version.step,
            digest=self.version.digest,
            kind=self.kind,
            parent=self.parent,
            created_at=self.created_at,
            lineage=self.lineage,
            metrics=self.metrics,
            files_folder=self.files_folder,
            lease_token=self.lease_token,
            parent_digest=self.parent_digest,
            files=_records(self.files),
            content=_records(self.content),
        )
        return record.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Manifest":
        """Reads manifest.json; ``where`` is named in errors.

        Raises CorruptVersionError if it is not a manifest of a format this release knows, or names a file outside
        its folder.
        """
        try:
            record = _ManifestRecord.model_validate_json(data)
            for entry in (*record.files, *record.content):
                check_file_name(entry.name)
            if record.files_folder:
                check_name("files folder", record.files_folder)
            check_name("run id", record.run_id)
            check_name("model name", record.name)
            check_step(record.step)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "it"
            raise CorruptVersionError(f"{where} is not a manifest: {place}: {first['msg']}") from error
        except InvalidNameError as error:
            raise CorruptVersionError(f"{where} is not a safe manifest: {error}") from error
        if record.format > ADAPTER_FORMAT:
            raise CorruptVersionError(
                f"{where} has format {record.format}, this release reads up to {ADAPTER_FORMAT}: upgrade trimtab"
            )
        if record.kind == "delta" and not (record.parent and record.parent_digest and record.content):
            raise CorruptVersionError(f"{where} is not a manifest: a delta has a parent, its digest and a content")
        if record.kind == "adapter" and not (record.parent and record.parent_digest):
            raise CorruptVersionError(f"{where} is not a manifest: an adapter has a base and its digest")
        return cls(
            version=ModelVersion(run_id=record.run_id, name=record.name, step=record.step, digest=record.digest),
            files=_entries(record.files),
            created_at=record.created_at,
            parent=record.parent,
            lineage=record.lineage,
            metrics=record.metrics,
            kind=record.kind,
            files_folder=record.files_folder,
            lease_token=record.lease_token,
            parent_digest=record.parent_digest,
            content=_entries(record.content),
            format=record.format,
        )


class _Record(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")


class _FileRecord(_Record):
    name: str
    size_bytes: int = Field(ge=0)
    digest: Digest


class _ManifestRecord(_Record):
    format: int
    run_id: str
    name: str
    step: int
    digest: Digest
    kind: Kind
    parent: str | None
    created_at: datetime
    lineage: dict[str, str]
    metrics: dict[str, float]
    files_folder: str = ""
    lease_token: int = Field(default=0, ge=0)
    parent_digest: Digest | None = None
    files: list[_FileRecord] = Field(min_length=1)
    content: list[_FileRecord] = []


def _records(entries: tuple[FileEntry, ...]) -> list[_FileRecord]:
    return [_FileRecord(name=e.name, size_bytes=e.size_bytes, digest=e.digest) for e in entries]


def _entries(records: list[_FileRecord]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(record.name, record.size_bytes, record.digest) for record in records)


class Pointer(_Record):
    """``current.json``: the version that is current, the largest step the pointer has ever stood at, and the lease
    under which it moved last (0 if none ever was held).

    The largest step tells a roll back (do not move forward again by yourself) from a publish that was cut off
    between manifest and pointer (do).
    """

    step: int
    digest: Digest
    highest_step: int
    lease_token: int = 0
    moved_at: datetime

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Pointer":
        """Reads current.json. Raises CorruptVersionError naming ``where``."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise CorruptVersionError(
                f"{where} is not a pointer: remove it, then `trimtab versions rollback`"
            ) from error

    def to_json(self) -> bytes:
        """The bytes of current.json."""
        return self.model_dump_json(indent=2).encode() + b"\n"

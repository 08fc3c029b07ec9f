"""``weights.delta``: what turns the tensors of a parent version into those of a child, in one file.

    8 bytes magic, 8 bytes length (little-endian), the header (zstd of JSON), then the frames of all stretches

The header holds each safetensors file's own header, so that the child's files come out byte for byte, and per tensor
the digest of its bytes: with them the version's content digest can be computed without the files. A tensor without
stretches is its parent's; one that the parent lacks, or has in another dtype or shape, is there in full.
"""

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import zstandard
from pydantic import BaseModel, Field, ValidationError

from trimtab.weights import delta_codec
from trimtab.weights.delta_codec import STRETCH_ELEMENTS, Stretch, element_bytes
from trimtab.weights.digests import TensorDigest, TensorSlot, parse_safetensors_header
from trimtab.weights.errors import CorruptVersionError, RefusedFileError
from trimtab_client import ModelVersion

DELTA_FILE = "weights.delta"
_MAGIC = b"TRIMDLT1"
_MAX_HEADER_BYTES = 256 << 20


class StretchRecord(BaseModel):
    """Where the frames of one stretch lie: ``offset`` from the end of the header, then positions, then values."""

    start: int = Field(ge=0)
    changed: int = Field(ge=1)
    offset: int = Field(ge=0)
    positions_bytes: int = Field(ge=0)
    values_bytes: int = Field(ge=1)


class TensorRecord(BaseModel):
    """One tensor of the child: digest of its bytes, and its stretches by ``start``."""

    name: str
    blake3: str = Field(pattern=r"^[0-9a-f]{64}$")
    stretches: list[StretchRecord] = []


class WeightsFile(BaseModel):
    """One safetensors file of the child: its header's text, its size, its tensors in file order."""

    name: str
    header: str
    size_bytes: int
    tensors: list[TensorRecord] = []

    def slots(self) -> list[TensorSlot]:
        """Its tensors' places. Raises CorruptVersionError."""
        try:
            slots = parse_safetensors_header(self.header.encode(), self.size_bytes, self.name)
        except RefusedFileError as error:
            raise CorruptVersionError(f"the delta's {error}") from error
        if [slot.name for slot in slots] != [tensor.name for tensor in self.tensors]:
            raise CorruptVersionError(f"the delta names other tensors of {self.name} than its header")
        return slots


class DeltaHeader(BaseModel):
    """What the file begins with."""

    parent_digest: str
    files: list[WeightsFile]

    def tensor_digests(self) -> Iterator[TensorDigest]:
        """Identities of all tensors of the child."""
        for file in self.files:
            folder = file.name.rpartition("/")[0]
            for slot, tensor in zip(file.slots(), file.tensors, strict=True):
                yield TensorDigest(folder, slot.name, slot.dtype, slot.shape, tensor.blake3)


@dataclass(frozen=True)
class TensorPatch:
    """All that changes in one tensor of dtype and shape. ``stretches`` are (first element, changes)."""

    folder: str
    slot: TensorSlot
    blake3: str
    stretches: tuple[tuple[int, Stretch], ...]

    @property
    def whole(self) -> bool:
        """Whether every element is there, so that nothing of a parent is needed."""
        return sum(stretch.elements for _, stretch in self.stretches if stretch.positions is None) == elements_of(
            self.slot
        )

    @property
    def changed(self) -> int:
        """How many elements are overwritten."""
        return sum(stretch.changed for _, stretch in self.stretches)

    def positions(self) -> np.ndarray:
        """Flat positions of the changed elements, int64, ascending."""
        parts = [
            start + (np.arange(stretch.elements) if stretch.positions is None else stretch.positions)
            for start, stretch in self.stretches
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def values(self) -> np.ndarray:
        """New values as bits (uint16 for BF16), in the order of ``positions``."""
        width = element_bytes(self.slot.dtype)
        return np.concatenate([np.empty(0, f"<u{width}"), *(stretch.values for _, stretch in self.stretches)])


def elements_of(slot: TensorSlot) -> int:
    """How many elements of ``element_bytes`` a tensor has."""
    return (slot.end - slot.start) // element_bytes(slot.dtype)


class DeltaReader:
    """An open delta file; stretches are read one by one. Close it, or use it as a context.

    Raises CorruptVersionError for what is not a delta, OSError.
    """

    def __init__(self, path: Path, version: ModelVersion) -> None:
        self.version = version
        self._file: BinaryIO = path.open("rb")
        try:
            self.header, self._frames_start = self._read_header()
        except (ValidationError, zstandard.ZstdError, struct.error, MemoryError) as error:
            self._file.close()
            raise CorruptVersionError(f"{version}: {path.name} has a broken header: {type(error).__name__}") from error
        except BaseException:
            self._file.close()
            raise
        self.tensors = {
            (file.name.rpartition("/")[0], slot.name): (slot, tensor)
            for file in self.header.files
            for slot, tensor in zip(file.slots(), file.tensors, strict=True)
        }

    def _read_header(self) -> tuple[DeltaHeader, int]:
        prefix = self._file.read(16)
        magic, length = struct.unpack("<8sQ", prefix)
        if magic != _MAGIC or length > _MAX_HEADER_BYTES:
            raise CorruptVersionError(f"{self.version}: its delta does not begin as one")
        raw = self._file.read(length)
        if not 0 <= zstandard.frame_content_size(raw) <= _MAX_HEADER_BYTES:
            raise CorruptVersionError(f"{self.version}: its delta's header is too large")
        return DeltaHeader.model_validate_json(zstandard.ZstdDecompressor().decompress(raw)), 16 + length

    def stretch(self, slot: TensorSlot, record: StretchRecord) -> Stretch:
        """One stretch's changes; several threads may ask at once."""
        width = element_bytes(slot.dtype)
        elements = min(STRETCH_ELEMENTS, elements_of(slot) - record.start)
        if record.start % STRETCH_ELEMENTS or elements <= 0 or record.changed > elements:
            raise CorruptVersionError(f"{self.version}: its delta has a stretch outside of {slot.name}")
        begin = self._frames_start + record.offset
        middle = begin + record.positions_bytes
        if middle + record.values_bytes > os.fstat(self._file.fileno()).st_size:
            raise CorruptVersionError(f"{self.version}: its delta ends in the middle of {slot.name}")
        positions = os.pread(self._file.fileno(), record.positions_bytes, begin)
        values = os.pread(self._file.fileno(), record.values_bytes, middle)
        return delta_codec.decode(positions, values, elements, record.changed, width)

    def patches(self) -> Iterator[TensorPatch]:
        """The changed tensors one by one, in file order."""
        for (folder, _), (slot, tensor) in self.tensors.items():
            if tensor.stretches:
                yield TensorPatch(
                    folder,
                    slot,
                    tensor.blake3,
                    tuple((record.start, self.stretch(slot, record)) for record in tensor.stretches),
                )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "DeltaReader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_delta(path: Path, header: DeltaHeader, frames: BinaryIO) -> None:
    """Writes the file from its header and the frames, which are read from their beginning."""
    packed = zstandard.ZstdCompressor(level=3).compress(header.model_dump_json().encode())
    frames.seek(0)
    with path.open("xb") as file:
        file.write(_MAGIC + struct.pack("<Q", len(packed)) + packed)
        while block := frames.read(io.DEFAULT_BUFFER_SIZE * 128):
            file.write(block)

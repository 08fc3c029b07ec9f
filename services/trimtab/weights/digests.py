"""Digests of content: what makes two sets of weights the same version.

A version's digest covers each tensor's folder, name, dtype, shape and bytes, sorted, and the name and bytes of every
other file. How tensors are spread over shards, and the order inside a shard, do not count, so the digest of weights
rebuilt in memory equals that of the files. The safetensors header is read here (8 bytes little-endian length, then
JSON), so neither torch nor safetensors is needed.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from trimtab.weights.errors import RefusedFileError
from trimtab.weights.parallel import in_order, thread_budget

SAFETENSORS = ".safetensors"
SHARD_INDEX = ".safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_THREADS_ABOVE_BYTES = 1 << 20  # below, starting threads takes longer than hashing
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies: ``start`` and ``end`` are byte offsets from the beginning of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, order=True)
class TensorDigest:
    """One tensor's identity. ``folder`` is '' at the top of the version; ``blake3`` is of the little-endian bytes."""

    folder: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    blake3: str


@dataclass(frozen=True, order=True)
class FileDigest:
    """The identity of one file that is not safetensors."""

    name: str
    blake3: str


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """'blake3:<hex>' of ``data``."""
    return f"blake3:{blake3(data).hexdigest()}"


def digest_file(path: Path) -> str:
    """'blake3:<hex>' of a file's bytes. Raises OSError."""
    hasher = blake3(max_threads=thread_budget() if path.stat().st_size > _THREADS_ABOVE_BYTES else 1)
    hasher.update_mmap(path)
    return f"blake3:{hasher.hexdigest()}"


def tensor_digest(
    name: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview, folder: str = ""
) -> TensorDigest:
    """Identity of a tensor held in memory. ``dtype`` in safetensors' words ('F32', 'BF16'); ``data`` little-endian."""
    return TensorDigest(folder, name, dtype, shape, blake3(data).hexdigest())


def content_digest(tensors: Iterable[TensorDigest], others: Iterable[FileDigest]) -> str:
    """The digest of a version, 'blake3:<hex>', from the identities of its parts in any order."""
    hasher = blake3(b"trimtab content 1\n")
    for tensor in sorted(tensors):
        hasher.update(_line("tensor", tensor.folder, tensor.name, tensor.dtype, list(tensor.shape), tensor.blake3))
    for file in sorted(others):
        hasher.update(_line("file", file.name, file.blake3))
    return f"blake3:{hasher.hexdigest()}"


def _line(*fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def folder_content_digest(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> str:
    """The content digest of the named files under ``folder``. ``known`` and errors are ``folder_digests``'s."""
    return content_digest(*folder_digests(folder, names, known))


def folder_digests(
    folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None
) -> tuple[list[TensorDigest], list[FileDigest]]:
    """Identities of all tensors and of all other files among the named files under ``folder``.

    ``known`` holds digests of whole files that were read just now, by name; they are not read again for it.
    Raises RefusedFileError for a broken safetensors file or a tensor that two shards hold, OSError if a file is absent.
    """
    known = known or {}
    tensors: dict[tuple[str, str], TensorDigest] = {}
    others: list[FileDigest] = []
    for name in sorted(names):
        if name.endswith(SAFETENSORS):
            for tensor in file_tensor_digests(folder / name, name.rpartition("/")[0]):
                if tensors.setdefault((tensor.folder, tensor.name), tensor) is not tensor:
                    raise RefusedFileError(f"tensor {tensor.name!r} is in two safetensors files, the second is {name}")
        elif not name.endswith(SHARD_INDEX):  # the index only repeats how tensors are spread over shards
            others.append(FileDigest(name, known.get(name) or digest_file(folder / name)))
    return list(tensors.values()), others


def file_tensor_digests(path: Path, folder: str = "") -> list[TensorDigest]:
    """Identities of all tensors of one safetensors file. Raises RefusedFileError if it is broken."""
    slots = read_safetensors_header(path)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):

        def digest(slot: TensorSlot) -> TensorDigest:
            with view[slot.start : slot.end] as data:
                return tensor_digest(slot.name, slot.dtype, slot.shape, data, folder)

        return list(in_order(digest, slots))


def read_safetensors_header(path: Path) -> list[TensorSlot]:
    """The tensors of a safetensors file in file order, every offset checked against dtype, shape and file size.

    Raises RefusedFileError if the header is not valid or the tensors do not fill the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise RefusedFileError(
                f"{path.name} is not a whole safetensors file: its header does not fit into {size} bytes"
            )
        raw = file.read(length)
    return parse_safetensors_header(raw, size, path.name)


def parse_safetensors_header(raw: bytes, size: int, file_name: str) -> list[TensorSlot]:
    """The tensors that a header of a file of ``size`` bytes names. Raises RefusedFileError naming the file."""
    length = len(raw)
    try:
        header = json.loads(raw)
        slots = [_slot(name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RefusedFileError(f"{file_name} has a broken safetensors header: {error}") from error
    slots.sort(key=lambda slot: (slot.start, slot.end))
    position = 8 + length
    for slot in slots:
        if slot.start != position:
            raise RefusedFileError(
                f"{file_name} is broken: tensor {slot.name!r} does not begin where the one before it ends"
            )
        position = slot.end
    if position != size:
        raise RefusedFileError(f"{file_name} is broken: its tensors end at byte {position}, the file at {size}")
    return slots


def _slot(name: str, entry: dict[str, Any], data_start: int) -> TensorSlot:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has a shape or offset that is not a count")
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name!r} of {dtype}{shape} does not fill {end - begin} bytes")
    return TensorSlot(name, dtype, tuple(shape), data_start + begin, data_start + end)

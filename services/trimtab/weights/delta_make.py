"""Makes ``weights.delta`` out of a parent's folder and a child's, stretch by stretch; both are mapped, not read."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from trimtab.weights.delta_codec import STRETCH_ELEMENTS, Stretch, compare, element_bytes, encode
from trimtab.weights.delta_file import (
    DeltaHeader,
    StretchRecord,
    TensorRecord,
    WeightsFile,
    elements_of,
    write_delta,
)
from trimtab.weights.digests import SAFETENSORS, TensorDigest, TensorSlot, read_safetensors_header

Key = tuple[str, str]


class MappedWeights:
    """Tensors of the safetensors files of one folder, by (subfolder, name), as bits of mapped memory."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.headers: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.slots: dict[str, list[TensorSlot]] = {}
        self._places: dict[Key, tuple[np.ndarray, TensorSlot]] = {}
        for name in sorted(name for name in names if name.endswith(SAFETENSORS)):
            path = folder / name
            self.slots[name] = read_safetensors_header(path)
            mapped = np.memmap(path, np.uint8, mode="r")
            length = int.from_bytes(mapped[:8].tobytes(), "little")
            self.headers[name] = mapped[8 : 8 + length].tobytes().decode()
            self.sizes[name] = len(mapped)
            for slot in self.slots[name]:
                self._places[name.rpartition("/")[0], slot.name] = (mapped, slot)

    def slot(self, key: Key) -> TensorSlot | None:
        """Where a tensor lies, None without it."""
        place = self._places.get(key)
        return place[1] if place else None

    def bits(self, key: Key, start: int, elements: int) -> np.ndarray:
        """A stretch of a tensor as unsigned integers, without a copy."""
        mapped, slot = self._places[key]
        width = element_bytes(slot.dtype)
        begin = slot.start + start * width
        return mapped[begin : begin + elements * width].view(f"<u{width}")


def same_kind(one: TensorSlot | None, other: TensorSlot) -> bool:
    """Whether elements of both can be compared: equal dtype and shape."""
    return one is not None and (one.dtype, one.shape) == (other.dtype, other.shape)


def make_delta(
    parent: MappedWeights,
    parent_digest: str,
    child: MappedWeights,
    digests: Mapping[Key, TensorDigest],
    target: Path,
    max_bytes: int,
) -> bool:
    """Writes ``target``, or gives up and returns False once its frames exceed ``max_bytes``. Raises OSError."""
    with tempfile.TemporaryFile(dir=target.parent) as frames:
        files = []
        for name, slots in child.slots.items():
            folder = name.rpartition("/")[0]
            tensors = []
            for slot in slots:
                stretches = _stretches(parent, child, (folder, slot.name), slot, frames)
                tensors.append(
                    TensorRecord(name=slot.name, blake3=digests[folder, slot.name].blake3, stretches=stretches)
                )
                if frames.tell() > max_bytes:
                    return False
            files.append(
                WeightsFile(name=name, header=child.headers[name], size_bytes=child.sizes[name], tensors=tensors)
            )
        write_delta(target, DeltaHeader(parent_digest=parent_digest, files=files), frames)
    return True


def _stretches(
    parent: MappedWeights, child: MappedWeights, key: Key, slot: TensorSlot, frames: BinaryIO
) -> list[StretchRecord]:
    comparable = same_kind(parent.slot(key), slot)
    total = elements_of(slot)
    records = []
    for start in range(0, total, STRETCH_ELEMENTS):
        count = min(STRETCH_ELEMENTS, total - start)
        new = child.bits(key, start, count)
        stretch = compare(parent.bits(key, start, count), new) if comparable else Stretch(count, None, new)
        if stretch is None:
            continue
        offset = frames.tell()
        positions, values = encode(stretch)
        frames.write(positions)
        frames.write(values)
        records.append(
            StretchRecord(
                start=start,
                changed=stretch.changed,
                offset=offset,
                positions_bytes=len(positions),
                values_bytes=len(values),
            )
        )
    return records

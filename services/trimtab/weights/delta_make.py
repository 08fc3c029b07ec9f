"""Makes ``weights.delta`` out of a parent's folder and a child's, stretch by stretch; both are mapped, not read."""

import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
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
from trimtab.weights.parallel import in_order

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
    files = {
        name: WeightsFile(
            name=name,
            header=child.headers[name],
            size_bytes=child.sizes[name],
            tensors=[TensorRecord(name=slot.name, blake3=digests[_folder(name), slot.name].blake3) for slot in slots],
        )
        for name, slots in child.slots.items()
    }
    places = (
        _Place(tensor, (_folder(name), slot.name), slot, start)
        for name, slots in child.slots.items()
        for slot, tensor in zip(slots, files[name].tensors, strict=True)
        for start in range(0, elements_of(slot), STRETCH_ELEMENTS)
    )
    with (
        tempfile.TemporaryFile(dir=target.parent) as frames,
        closing(in_order(lambda place: (place, place.changes(parent, child)), places)) as made,
    ):
        for place, changes in made:
            if changes is not None:
                place.write(*changes, frames)
            if frames.tell() > max_bytes:
                return False
        write_delta(target, DeltaHeader(parent_digest=parent_digest, files=list(files.values())), frames)
    return True


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


@dataclass(frozen=True)
class _Place:
    """One stretch of a tensor: where it begins, and the record of the tensor that it belongs to."""

    tensor: TensorRecord
    key: Key
    slot: TensorSlot
    start: int

    def changes(self, parent: MappedWeights, child: MappedWeights) -> tuple[int, bytes, bytes] | None:
        """How many elements change, and the frames of positions and values; None if nothing does."""
        count = min(STRETCH_ELEMENTS, elements_of(self.slot) - self.start)
        new = child.bits(self.key, self.start, count)
        comparable = same_kind(parent.slot(self.key), self.slot)
        old = parent.bits(self.key, self.start, count) if comparable else None
        stretch = Stretch(count, None, new) if old is None else compare(old, new)
        return None if stretch is None else (stretch.changed, *encode(stretch))

    def write(self, changed: int, positions: bytes, values: bytes, frames: BinaryIO) -> None:
        """Appends the frames, and says so in the tensor's record."""
        record = StretchRecord(
            start=self.start,
            changed=changed,
            offset=frames.tell(),
            positions_bytes=len(positions),
            values_bytes=len(values),
        )
        frames.write(positions)
        frames.write(values)
        self.tensor.stretches.append(record)

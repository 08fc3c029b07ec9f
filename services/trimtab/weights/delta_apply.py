"""Rebuilds the plain folder of a version from a whole one and the deltas after it, stretch by stretch.

Every byte is checked on its way: a tensor against its digest in the last delta, that delta's digests against the
version's, a file against the manifest. What comes out is the folder that was published, or CorruptVersionError.
"""

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from trimtab.weights.delta_codec import STRETCH_ELEMENTS, element_bytes
from trimtab.weights.delta_file import DeltaReader, WeightsFile, elements_of
from trimtab.weights.delta_make import Key, MappedWeights, same_kind
from trimtab.weights.digests import SAFETENSORS, SHARD_INDEX, FileDigest, TensorSlot, content_digest
from trimtab.weights.errors import CorruptVersionError
from trimtab.weights.folder import check_readable, verify_file
from trimtab.weights.manifest import Manifest
from trimtab.weights.parallel import in_order


@dataclass(frozen=True)
class Layer:
    """One delta of a chain: its manifest, the folder where its files lie (verified), and its open delta."""

    manifest: Manifest
    folder: Path
    delta: DeltaReader


def check_delta(layer: Layer) -> None:
    """Returns if the delta's tensor digests are those of its version. Raises CorruptVersionError."""
    manifest, header = layer.manifest, layer.delta.header
    if header.parent_digest != manifest.parent_digest:
        raise CorruptVersionError(f"{manifest.version}: its delta was made for {header.parent_digest}, not its parent")
    names_nothing = (SAFETENSORS, SHARD_INDEX)
    others = [FileDigest(e.name, e.digest) for e in manifest.content if not e.name.endswith(names_nothing)]
    if content_digest(header.tensor_digests(), others) != manifest.version.digest:
        raise CorruptVersionError(f"{manifest.version}: its delta holds other tensors than the version")


def rebuild(base: Path, base_names: Sequence[str], layers: Sequence[Layer], folder: Path) -> None:
    """Fills the empty ``folder`` with the files of the last layer's version; ``base`` is the first layer's parent.

    Raises CorruptVersionError if the result is not that version, OSError.
    """
    target = layers[-1]
    check_delta(target)
    version = str(target.manifest.version)
    check_readable(target.manifest.plain)
    weights = MappedWeights(base, base_names)
    files = {file.name: file for file in target.delta.header.files}
    for entry in target.manifest.content:
        path = folder / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not entry.name.endswith(SAFETENSORS):
            shutil.copyfile(_holder(base, layers, entry.name) / entry.name, path)
        elif entry.name in files:
            _rebuild_file(weights, layers, path, files.pop(entry.name))
        else:
            raise CorruptVersionError(f"{version}: its delta lacks {entry.name}")
        verify_file(path, entry, version)
    if files:
        raise CorruptVersionError(f"{version}: its delta has {min(files)}, which is not part of the version")


def _holder(base: Path, layers: Sequence[Layer], name: str) -> Path:
    """The newest folder of the chain that has a file."""
    for layer in reversed(layers):
        if any(entry.name == name for entry in layer.manifest.files):
            return layer.folder
    return base


def _rebuild_file(weights: MappedWeights, layers: Sequence[Layer], path: Path, file: WeightsFile) -> None:
    subfolder = file.name.rpartition("/")[0]
    header = file.header.encode()
    tensors = [_Tensor(weights, layers, (subfolder, slot.name), slot) for slot in file.slots()]
    stretches = ((tensor, start) for tensor in tensors for start in range(0, tensor.elements, STRETCH_ELEMENTS))
    with (
        path.open("xb") as output,
        closing(in_order(lambda stretch: stretch[0].bits(stretch[1]), stretches)) as made,
    ):
        output.write(len(header).to_bytes(8, "little") + header)
        for tensor, record in zip(tensors, file.tensors, strict=True):
            hasher = blake3()
            for _ in range(0, tensor.elements, STRETCH_ELEMENTS):
                data = next(made).view(np.uint8).data
                hasher.update(data)
                output.write(data)
            if hasher.hexdigest() != record.blake3:
                version = layers[-1].manifest.version
                raise CorruptVersionError(f"{version}: {record.name} does not come out of its deltas")


class _Tensor:
    """A tensor as it is after the last layer: the base's bits, overwritten by each delta in turn."""

    def __init__(self, weights: MappedWeights, layers: Sequence[Layer], key: Key, slot: TensorSlot) -> None:
        self.elements = elements_of(slot)
        self._weights, self._key, self._slot = weights, key, slot
        self._based = same_kind(weights.slot(key), slot)
        self._records = []  # of the layers that speak of this tensor as it is now
        for layer in layers:
            entry = layer.delta.tensors.get(key)
            if entry is not None and same_kind(entry[0], slot):
                self._records.append((layer.delta, {record.start: record for record in entry[1].stretches}))

    def bits(self, start: int) -> np.ndarray:
        """One stretch of its bits, a copy."""
        count = min(STRETCH_ELEMENTS, self.elements - start)
        if self._based:
            bits = self._weights.bits(self._key, start, count).copy()
        else:
            bits = np.zeros(count, f"<u{element_bytes(self._slot.dtype)}")
        for delta, by_start in self._records:
            if start in by_start:
                delta.stretch(self._slot, by_start[start]).apply(bits)
        return bits

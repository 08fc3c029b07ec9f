"""Rebuilds the plain folder of a version from a whole one and the deltas after it, stretch by stretch.

Every byte is checked on its way: a tensor against its digest in the last delta, that delta's digests against the
version's, a file against the manifest. What comes out is the folder that was published, or CorruptVersionError.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from trimtab.weights.delta_codec import STRETCH_ELEMENTS, element_bytes
from trimtab.weights.delta_file import DeltaReader, elements_of
from trimtab.weights.delta_make import Key, MappedWeights, same_kind
from trimtab.weights.digests import SAFETENSORS, SHARD_INDEX, FileDigest, TensorSlot, content_digest
from trimtab.weights.errors import CorruptVersionError
from trimtab.weights.manifest import Manifest


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
    weights = MappedWeights(base, base_names)
    for file in target.delta.header.files:
        _rebuild_file(weights, layers, folder, file.name)
    for entry in target.manifest.content:
        if not _is_weights(entry.name):
            path = folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_holder(base, layers, entry.name) / entry.name, path)


def _is_weights(name: str) -> bool:
    return name.endswith(SAFETENSORS)


def _holder(base: Path, layers: Sequence[Layer], name: str) -> Path:
    """The newest folder of the chain that has a file."""
    for layer in reversed(layers):
        if any(entry.name == name for entry in layer.manifest.files):
            return layer.folder
    return base


def _rebuild_file(weights: MappedWeights, layers: Sequence[Layer], folder: Path, name: str) -> None:
    target = layers[-1]
    file = next(file for file in target.delta.header.files if file.name == name)
    expected = {entry.name: entry for entry in target.manifest.content}.get(name)
    subfolder = name.rpartition("/")[0]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header = file.header.encode()
    whole = blake3()
    with path.open("xb") as output:
        start = len(header).to_bytes(8, "little") + header
        whole.update(start)
        output.write(start)
        for slot, tensor in zip(file.slots(), file.tensors, strict=True):
            hasher = blake3()
            for data in _tensor_bits(weights, layers, (subfolder, slot.name), slot):
                view = data.view(np.uint8).data
                hasher.update(view)
                whole.update(view)
                output.write(view)
            if hasher.hexdigest() != tensor.blake3:
                raise CorruptVersionError(f"{target.manifest.version}: {slot.name} does not come out of its deltas")
    if expected is None or f"blake3:{whole.hexdigest()}" != expected.digest:
        raise CorruptVersionError(f"{target.manifest.version}: {name} does not come out of its deltas")


def _tensor_bits(weights: MappedWeights, layers: Sequence[Layer], key: Key, slot: TensorSlot) -> Iterator[np.ndarray]:
    """The tensor's bits, one stretch at a time: the base's, overwritten by each delta in turn."""
    based = same_kind(weights.slot(key), slot)
    records = []  # of the layers that speak of this tensor as it is now
    for layer in layers:
        entry = layer.delta.tensors.get(key)
        if entry is not None and same_kind(entry[0], slot):
            records.append((layer.delta, {record.start: record for record in entry[1].stretches}))
    total = elements_of(slot)
    for start in range(0, total, STRETCH_ELEMENTS):
        count = min(STRETCH_ELEMENTS, total - start)
        bits = weights.bits(key, start, count).copy() if based else np.zeros(count, f"<u{element_bytes(slot.dtype)}")
        for delta, by_start in records:
            if start in by_start:
                delta.stretch(slot, by_start[start]).apply(bits)
        yield bits

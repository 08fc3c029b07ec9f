"""What changed between a version that is being served and a later one, for weights held in memory.

A service that has the earlier version in memory needs neither the files nor the tensors that stayed: it takes the
positions and new values and writes them between two steps, or builds the changed tensors aside first.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from blake3 import blake3

from trimtab.weights.backend import Backend
from trimtab.weights.catalog import Catalog
from trimtab.weights.chain import chain_of
from trimtab.weights.delta_apply import Layer, check_delta
from trimtab.weights.delta_codec import element_bytes
from trimtab.weights.delta_file import TensorPatch, TensorRecord
from trimtab.weights.digests import SAFETENSORS, SHARD_INDEX, TensorSlot
from trimtab.weights.errors import CorruptVersionError, WrongParentError
from trimtab.weights.fetch import layers_of
from trimtab.weights.manifest import FileEntry, Manifest
from trimtab_client import ModelVersion


class Changes:
    """The deltas between two versions, their bytes verified; read it inside the context that gave it."""

    def __init__(self, served: ModelVersion, layers: list[Layer]) -> None:
        self.served = served
        self.version = layers[-1].manifest.version
        self._layers = layers

    def patches(self) -> Iterator[TensorPatch]:
        """Changed tensors one by one. A tensor may come several times: the later overwrite the earlier."""
        for layer in self._layers:
            yield from layer.delta.patches()

    @property
    def tensors(self) -> Mapping[tuple[str, str], tuple[TensorSlot, TensorRecord]]:
        """All tensors of the later version by subfolder and name."""
        return self._layers[-1].delta.tensors

    @property
    def changed_elements(self) -> int:
        """How many elements are overwritten, those that change twice counted twice."""
        return sum(
            record.changed
            for layer in self._layers
            for _, tensor in layer.delta.tensors.values()
            for record in tensor.stretches
        )

    def staged(self, served: Mapping[str, np.ndarray], digest: str) -> dict[str, np.ndarray]:
        """The changed tensors, whole, as bits of shape (elements,); ``served`` is left as it is.

        ``served`` maps names ('adapter/w' in a subfolder) to the bits of the version of this ``digest``: uint16 for
        BF16. Raises WrongParentError if that is not the version the changes begin at, CorruptVersionError if a tensor
        does not come out.
        """
        if digest != self.served.digest:
            raise WrongParentError(f"{self.version} changes {self.served.digest}, what is served is {digest}")
        out: dict[str, np.ndarray] = {}
        for patch in self.patches():
            name = f"{patch.folder}/{patch.slot.name}".lstrip("/")
            if name not in out:
                out[name] = self._begun(patch, served.get(name))
            for start, stretch in patch.stretches:
                stretch.apply(out[name][start : start + stretch.elements])
        for (folder, tensor_name), (_, tensor) in self._layers[-1].delta.tensors.items():
            name = f"{folder}/{tensor_name}".lstrip("/")
            if name in out and blake3(out[name].view(np.uint8).data).hexdigest() != tensor.blake3:
                raise CorruptVersionError(f"{self.version}: {name} does not come out of what is served")
        return out

    def _begun(self, patch: TensorPatch, bits: np.ndarray | None) -> np.ndarray:
        width = element_bytes(patch.slot.dtype)
        count = (patch.slot.end - patch.slot.start) // width
        if patch.whole:
            return np.zeros(count, f"<u{width}")
        if bits is None or bits.size != count or bits.dtype.itemsize != width:
            raise WrongParentError(f"{self.version}: what is served has no {patch.slot.name} of {patch.slot.dtype}")
        return bits.reshape(-1).copy()


@contextmanager
def changes(backend: Backend, served: ModelVersion, manifest: Manifest) -> Iterator[Changes | None]:
    """The changes from ``served`` to a version, None where the way between them is not made of deltas alone.

    None too if another file than weights changed (a config, a tokenizer): load the folder then.
    Raises CorruptVersionError, ParentMissingError, OSError.
    """
    chain = chain_of(Catalog(backend), manifest)
    found = [position for position, each in enumerate(chain) if each.version == served]
    if not found or found[0] == len(chain) - 1 or _settings(chain[found[0]]) != _settings(manifest):
        yield None
        return
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-changes-") as scratch,
        layers_of(backend, chain[found[0] + 1 :], Path(scratch)) as layers,
    ):
        for layer in layers:
            check_delta(layer)
        yield Changes(served, layers)


def _settings(manifest: Manifest) -> set[FileEntry]:
    return {entry for entry in manifest.plain.files if not entry.name.endswith((SAFETENSORS, SHARD_INDEX))}

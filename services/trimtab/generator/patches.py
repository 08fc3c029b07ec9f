"""Stages a version as the elements that differ from the served one, where deltas lead from one to the other.

Nothing is rebuilt on a disk and nothing that stayed is read: a PPO step changes few elements of a half-precision model.
"""

from collections.abc import Mapping

import numpy as np
import torch

from trimtab.generator.engine import StagedPatches, WeightPatch
from trimtab.runtime.errors import data_loss
from trimtab.weights.changes import Changes
from trimtab.weights.delta_file import TensorPatch
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store
from trimtab_client.versions import ModelVersion

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}
MOST_CHANGED = 0.25  # a position takes 8 bytes: beyond this share whole tensors are the smaller


def stage_patches(
    store: Store, served: ModelVersion, manifest: Manifest, live: Mapping[str, torch.Tensor]
) -> StagedPatches | None:
    """The elements to overwrite in `live`, which holds `served`; None where the version has to be loaded whole.

    Raises StoreError; ServiceError DATA_LOSS for values that are not finite.
    """
    with store.changes(served, manifest) as changes:
        if changes is None or not _fits(changes, live):
            return None
        patches = []
        for patch in changes.patches():
            values = _values(patch)
            if not torch.isfinite(values).all():
                raise data_loss(f"{manifest.version} is broken: {patch.slot.name} holds numbers that are not finite")
            positions = torch.from_numpy(patch.positions())
            patches.append(WeightPatch(patch.slot.name, positions, values.to(live[patch.slot.name].dtype)))
    return StagedPatches(manifest.version, served, patches)


def _fits(changes: Changes, live: Mapping[str, torch.Tensor]) -> bool:
    """Whether the files hold all live tensors under the same names, and few of their elements change."""
    slots = [slot for (folder, _), (slot, _) in changes.tensors.items() if not folder]
    known = [s for s in slots if s.name in live and live[s.name].shape == s.shape and s.dtype in DTYPES]
    if len(known) != len(changes.tensors):
        return False
    held = {live[slot.name].data_ptr() for slot in slots}
    if held != {tensor.data_ptr() for tensor in live.values()}:  # tied ones lie in the files once
        return False
    return changes.changed_elements <= MOST_CHANGED * sum(live[slot.name].numel() for slot in slots)


def _values(patch: TensorPatch) -> torch.Tensor:
    bits = patch.values()
    numpy_bits, torch_bits = BITS[bits.dtype.itemsize]
    return torch.from_numpy(bits.view(numpy_bits)).view(torch_bits).view(DTYPES[patch.slot.dtype])

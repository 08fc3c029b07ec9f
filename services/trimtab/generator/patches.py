"""Stages a version as the elements that differ from the served one, where deltas lead from one to the other.

Nothing is rebuilt on a disk and nothing that stayed is read: a PPO step changes few elements of a half-precision model.
Each changed tensor is checked by its digest before the engine hears of it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from blake3 import blake3

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

    That is also where a tensor would not come out with the version's digest: loading whole finds what is damaged.
    Raises StoreError; ServiceError DATA_LOSS for values that are not finite.
    """
    with store.changes(served, manifest) as changes:
        if changes is None or not _fits(changes, live):
            return None
        staged: dict[str, list[WeightPatch]] = {}
        for patch in changes.patches():
            name, values = patch.slot.name, _values(patch)
            if not torch.isfinite(values).all():
                raise data_loss(f"{manifest.version} is broken: {name} holds numbers that are not finite")
            positions = torch.from_numpy(patch.positions())
            staged.setdefault(name, []).append(WeightPatch(name, positions, values.to(live[name].dtype)))
        for (_, name), (slot, record) in changes.tensors.items():
            if name in staged and _digest(live[name], staged[name], DTYPES[slot.dtype]) != record.blake3:
                return None
    return StagedPatches(manifest.version, served, [patch for patches in staged.values() for patch in patches])


def _fits(changes: Changes, live: Mapping[str, torch.Tensor]) -> bool:
    """Whether the files hold all live tensors, exactly, under the same names, and few of their elements change."""
    slots = [slot for (folder, _), (slot, _) in changes.tensors.items() if not folder]
    known = [s for s in slots if s.name in live and live[s.name].shape == s.shape and s.dtype in DTYPES]
    if len(known) != len(changes.tensors):
        return False
    if any(torch.promote_types(DTYPES[slot.dtype], live[slot.name].dtype) != live[slot.name].dtype for slot in slots):
        return False  # served in fewer bits than it is stored in: what is served cannot be checked
    held = {live[slot.name].data_ptr() for slot in slots}
    if held != {tensor.data_ptr() for tensor in live.values()}:  # tied ones lie in the files once
        return False
    return changes.changed_elements <= MOST_CHANGED * sum(live[slot.name].numel() for slot in slots)


def _values(patch: TensorPatch) -> torch.Tensor:
    bits = patch.values()
    numpy_bits, torch_bits = BITS[bits.dtype.itemsize]
    return torch.from_numpy(bits.view(numpy_bits)).view(torch_bits).view(DTYPES[patch.slot.dtype])


def _digest(live: torch.Tensor, patches: Sequence[WeightPatch], stored: torch.dtype) -> str:
    """The digest of a tensor's bytes as the store has them, were it patched."""
    flat = torch.empty(live.numel(), dtype=stored)
    flat.copy_(live.detach().reshape(-1))
    for patch in patches:
        flat.index_copy_(0, patch.positions, patch.values.to(stored))
    return blake3(flat.view(torch.uint8).numpy().data).hexdigest()

"""The served model's parameters, and how a new version takes their place between two steps.

Runners inherit it. What a runner makes of the parameters (llama.py lays them out anew) it makes in `prepare`, a piece a
step while sampling goes on, so that `take` costs next to nothing.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from trimtab.generator.engine import StagedPatches, StagedWeights, WeightPatch


class LiveWeights:
    """Owns the live model. Every method runs on the one thread that does model work."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.device = model.device

    def check(self, staged: StagedWeights | StagedPatches) -> None:
        """Raise ValueError where names and shapes are not those of the live model; callable from any thread."""
        live = self.model.state_dict()
        if isinstance(staged, StagedPatches):
            check_patches(live, staged.patches)
        else:
            check_weights(live, staged.tensors)

    def prepare(self, staged: StagedWeights | StagedPatches) -> Iterator[int]:
        """Get ready to take a checked version, a piece for each `next`; yields its elements. Nothing changes yet."""
        return iter(())

    @torch.no_grad()
    def take(self, staged: StagedWeights | StagedPatches) -> None:
        """Change to a checked version that `prepare` has come to the end of."""
        if isinstance(staged, StagedPatches):
            self._patch(staged.patches)
        else:
            self._replace(staged.tensors)

    def _replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put staged tensors in the place of the live parameters and buffers, which are left in their place."""
        live = self.model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            if (tensor.device, tensor.dtype) == (live[name].device, live[name].dtype):
                # No copy and nothing freed while sampling waits.
                before, live[name].data = live[name].data, tensor.data
                tensor.data = before
            else:
                live[name].data.copy_(tensor)

    def _patch(self, patches: Sequence[WeightPatch]) -> None:
        """Overwrite single elements of the live parameters and buffers, in the order given."""
        live = self.model.state_dict(keep_vars=True)
        for patch in patches:
            overwrite(live[patch.name].data, patch)


def overwrite(tensor: torch.Tensor, patch: WeightPatch) -> None:
    """Apply one patch to a contiguous tensor."""
    flat = tensor.view(-1)
    flat.index_copy_(0, patch.positions.to(flat.device), patch.values.to(flat.device))


def pieces(patch: WeightPatch, count: int) -> Iterator[WeightPatch]:
    """The patch in parts of at most `count` elements."""
    for positions, values in zip(patch.positions.split(count), patch.values.split(count), strict=True):
        yield WeightPatch(patch.name, positions, values)


def check_patches(live: Mapping[str, torch.Tensor], patches: Sequence[WeightPatch]) -> None:
    """Raise ValueError naming the first tensor that is unknown or of another dtype, or too small."""
    for patch in patches:
        if patch.name not in live:
            raise ValueError(f"the new version changes {patch.name}, which the served model lacks")
        target = live[patch.name]
        if target.dtype != patch.values.dtype or (
            len(patch.positions) and int(patch.positions.max()) >= target.numel()
        ):
            raise ValueError(f"the new version's {patch.name} does not fit the served {list(target.shape)}")


def check_weights(live: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError naming the first tensor that is missing, unknown or of another shape."""
    if missing := sorted(live.keys() - weights.keys()):
        raise ValueError(f"the new version lacks {len(missing)} tensors of the served model, first {missing[0]}")
    if unknown := sorted(weights.keys() - live.keys()):
        raise ValueError(f"the new version has {len(unknown)} tensors the served model lacks, first {unknown[0]}")
    for name, tensor in weights.items():
        if tensor.shape != live[name].shape:
            raise ValueError(
                f"tensor {name} has shape {list(tensor.shape)}, the served model {list(live[name].shape)}: "
                "a version must have the architecture of the model it replaces"
            )

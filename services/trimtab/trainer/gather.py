"""A model that lies in shards, as a plain Hugging Face folder: gathered and written file by file.

Rank 0 holds at most one file's tensors beside its shards; the other ranks one tensor at a time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.sharded import gathered
from trimtab.trainer.ranks import Ranks

FILE_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
Planned = list[tuple[str, torch.Tensor]]


def save_gathered(model: Policy | ScalarModel, folder: Path, ranks: Ranks, file_bytes: int = FILE_BYTES) -> None:
    """Write the model into rank 0's `folder` in its compute dtype; every rank must call it."""
    dtype = getattr(torch, model.dtype)
    files = list(_files(model, dtype, file_bytes))
    weight_map: dict[str, str] = {}
    for number, planned in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for key, tensor in planned:
            whole = gathered(tensor)
            if ranks.leads:
                tensors[key] = (whole.to(dtype) if whole.is_floating_point() else whole).cpu().contiguous()
                weight_map[key] = name
            del whole
        if ranks.leads:
            save_file(tensors, folder / name, metadata={"format": "pt"})
    if ranks.leads:
        if len(files) > 1:
            size_bytes = sum(_size_bytes(tensor, dtype) for planned in files for _, tensor in planned)
            index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _save_settings(model, folder)


def _files(model: Policy | ScalarModel, dtype: torch.dtype, file_bytes: int) -> Iterator[Planned]:
    """Weights by file; tied ones once, as `named_parameters` has them, and the buffers that are saved."""
    inner = model.model
    parameters, saved = dict(inner.named_parameters()), inner.state_dict().keys()
    buffers = {name: buffer for name, buffer in inner.named_buffers() if name in saved}
    planned: Planned = []
    room = file_bytes
    for key, tensor in (parameters | buffers).items():
        size_bytes = _size_bytes(tensor, dtype)
        if planned and size_bytes > room:
            yield planned
            planned, room = [], file_bytes
        planned.append((key, tensor))
        room -= size_bytes
    yield planned


def _size_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    return tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())


def _save_settings(model: Policy | ScalarModel, folder: Path) -> None:
    """What a folder has beside weights, as `save_pretrained` writes it."""
    config = copy.deepcopy(model.model.config)
    config.dtype = model.dtype
    config.architectures = [model.architecture]
    config.save_pretrained(folder)
    if model.model.can_generate() and model.model.generation_config is not None:
        model.model.generation_config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)

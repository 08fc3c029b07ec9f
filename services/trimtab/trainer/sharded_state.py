"""Checkpoints of several ranks: each writes its own shards (torch.distributed.checkpoint, in safetensors, no pickle).

A file's tensors are named FILE/TENSOR and cut by rows. Any number of ranks, one too, reads what another number wrote:
each gets the rows that are its own. Single numbers (Adam's step counts) are not here: `state.json` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trimtab.trainer.ranks import Ranks

Tensors = dict[str, torch.Tensor]
FILES = "shard-*.safetensors"


def write_shards(folder: Path, files: Mapping[str, Tensors], ranks: Ranks) -> None:
    """Write this rank's shards of `files`, whose tensors are distributed over the ranks."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors = {f"{file}/{name}": tensor for file, named in files.items() for name, tensor in named.items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(tensors, storage_writer=writer, process_group=ranks.words)


def read_shards(folder: Path, ranks: Ranks) -> dict[str, Tensors]:
    """This rank's rows of every tensor in the folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.tensor import DTensor, Shard, zeros

    reader = HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    mesh = ranks.mesh("cpu") if ranks.world > 1 else None
    wanted: Tensors = {}
    for name, about in known.items():
        shape, dtype = about.size, about.properties.dtype  # type: ignore[union-attr]
        if mesh is None:
            wanted[name] = torch.zeros(shape, dtype=dtype)
        else:
            wanted[name] = zeros(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    load(wanted, storage_reader=reader, process_group=ranks.words, no_dist=mesh is None)
    files: dict[str, Tensors] = {}
    for key, tensor in wanted.items():
        file, _, name = key.partition("/")
        files.setdefault(file, {})[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return files

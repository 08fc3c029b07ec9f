"""Models whose parameters lie in shards on several processes (FSDP2), and how a forward sees them whole. Not training.

Nothing here imports torch.distributed: for a model in one piece each function gives back what it got.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch

T = TypeVar("T")
METHOD = "run_with_whole_weights"
COMPUTE_DTYPE = "sharded_compute_dtype"


def whole_weights(model: torch.nn.Module, work: Callable[[], T]) -> T:
    """`work`, a forward that returns its tensors, with a sharded model's embeddings and head whole meanwhile.

    Layers gather their own weights when they are called; calls do not nest.
    """
    run = getattr(model, METHOD, None)
    return work() if run is None else run(work)


def compute_dtype(model: Any) -> str:
    """The dtype that a model computes and is published in: of a sharded one not that of its shards."""
    return str(getattr(model, COMPUTE_DTYPE, model.dtype)).removeprefix("torch.")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a parameter or gradient, sharing its memory; the tensor itself where it is whole."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local().detach()


def spread(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor of a parameter's shape of which this process holds `part`; `part` itself where nothing is sharded."""
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every process; all of them must ask."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()


def shard(model: torch.nn.Module, mesh: Any, dtype: torch.dtype) -> None:
    """Leave each process its shard of each parameter, gathered layer by layer in `dtype` when it is used.

    Gradients are summed over the processes, in the parameters' own dtype.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    own = next(model.parameters()).dtype
    casts = MixedPrecisionPolicy(
        param_dtype=None if dtype == own else dtype, reduce_dtype=own, cast_forward_inputs=False
    )
    body: Any = getattr(model, "base_model", model)
    for layer in getattr(body, "layers", None) or getattr(body, "h", None) or ():
        fully_shard(layer, mesh=mesh, mp_policy=casts)
    fully_shard(model, mesh=mesh, mp_policy=casts, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    setattr(model, COMPUTE_DTYPE, dtype)
    setattr(model, METHOD, MethodType(_run, model))
    register_fsdp_forward_method(model, METHOD)


def _run(model: torch.nn.Module, work: Callable[[], T]) -> T:
    return work()

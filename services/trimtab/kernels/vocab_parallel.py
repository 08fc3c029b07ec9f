"""Log-probs of a head whose vocabulary lies on several ranks, in shards of any width.

Each rank computes the statistics of its own columns and gathers everyone's: one collective of 16 bytes a token and
rank in float32. All ranks merge in rank order, so all get the same bits. In the backward pass each rank has its own
weight's gradient whole, and its part of the hidden states' gradient, which one all-reduce adds up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from trimtab.kernels.api import SelectedLogprobs
from trimtab.kernels.backends import backend_for
from trimtab.kernels.chunked_torch import compute_dtype
from trimtab.kernels.head_op import refuse_bad_temperature, upstream_or_zero, wanted
from trimtab.kernels.statistics import logprob_lse_entropy, merged


def vocab_parallel_logprobs(
    hidden_ND: torch.Tensor,
    weight_shard_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    temperature: float | torch.Tensor = 1.0,
    bias_shard: torch.Tensor | None = None,
    softcap: float | None = None,
) -> SelectedLogprobs:
    """As `api.selected_logprobs`, of columns [vocab_start, vocab_start + V) on this rank; all ranks call it together.

    Args:
        hidden_ND: equal on all ranks; so are `targets_N`, in the whole vocabulary's numbering, and the temperature.
        group: its ranks' shards are disjoint and together the whole vocabulary; None is the default group.

    Raises:
        ValueError: a temperature that is not positive.
    """
    dtype = compute_dtype(hidden_ND)
    temperature_N = torch.as_tensor(temperature, dtype=dtype, device=hidden_ND.device).expand(len(hidden_ND))
    temperature_N = temperature_N.contiguous()
    refuse_bad_temperature(temperature_N)
    local_N = targets_N - vocab_start
    columns = _VocabParallel.apply(hidden_ND, weight_shard_VD, bias_shard, local_N, temperature_N, softcap, group)
    return SelectedLogprobs(*columns)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        local_N: torch.Tensor,
        temperature_N: torch.Tensor,
        softcap: float | None,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        backend = backend_for(hidden_ND)
        mine_4N, _, _ = backend.head_forward(hidden_ND, weight_VD, bias_V, local_N, temperature_N, softcap, False)
        everyone = [torch.empty_like(mine_4N) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine_4N, group)
        columns = logprob_lse_entropy(merged(torch.stack(everyone)))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, local_N, temperature_N, *columns[1:])
        ctx.softcap, ctx.group = softcap, group
        return columns

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, local_N, temperature_N, lse_N, entropy_N = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        row_values_5N = torch.stack((lse_N, entropy_N, *(upstream_or_zero(grad, lse_N) for grad in upstream)))
        nothing = hidden_ND.new_empty((0, 0))
        gradients = backend_for(hidden_ND).head_backward(
            hidden_ND, weight_VD, bias_V, local_N, temperature_N, ctx.softcap, row_values_5N, nothing, nothing, needs
        )
        if needs[0]:
            whole_ND = gradients[0].to(compute_dtype(hidden_ND))
            dist.all_reduce(whole_ND, group=ctx.group)
            gradients = (whole_ND.to(hidden_ND.dtype), *gradients[1:])
        return *wanted(gradients, needs), None, None, None, None

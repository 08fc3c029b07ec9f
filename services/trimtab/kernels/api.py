"""The one door of the room: log-probs, log-sum-exp and entropy of chosen tokens from hidden states.

The trainer and the reference call the same function, so their log-probs can be subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trimtab.kernels.chunked_torch import SelectedLogprobsFunction


class SelectedLogprobs(NamedTuple):
    """Per row, float32 (float64 for float64 hidden states), in nats."""

    logprob_N: torch.Tensor
    lse_N: torch.Tensor
    entropy_N: torch.Tensor


def selected_logprobs(
    hidden_ND: torch.Tensor,
    head_weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> SelectedLogprobs:
    """log_softmax(softcap(hidden · weightᵀ + bias) / temperature) at `targets_N`, with lse and entropy.

    Never forms all [N, V] logits; differentiable in hidden, weight and bias, for any upstream gradient.

    Args:
        temperature: one for all rows, or one a row [N]; above 0.

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not positive.
    """
    rows, width = hidden_ND.shape
    if targets_N.shape != (rows,) or head_weight_VD.shape[1] != width:
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(head_weight_VD.shape)}, targets {tuple(targets_N.shape)}"
        )
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    temperature_N = torch.as_tensor(temperature, dtype=dtype, device=hidden_ND.device).expand(rows)
    if rows and not bool((temperature_N > 0).all()):
        raise ValueError("temperature must be positive")
    return SelectedLogprobs(
        *SelectedLogprobsFunction.apply(hidden_ND, head_weight_VD, bias, targets_N, temperature_N, softcap)
    )

"""The PPO loss over the LM head with its gradients, chunked torch: three matrix products, nothing recomputed.

A chunk's rows hold the whole vocabulary, so each row's own maximum is its offset: log-probs are bitwise those of
`selected_logprobs`, and the old log-sum-exp that Triton takes as a hint is not needed. The chunk's logits become their
exponentials and then the loss's gradient in place, with g = d(loss)/d(logprob) from `ppo_terms`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.kernels.chunked_torch import (
    HeadGradients,
    compute_dtype,
    exponentials,
    logit_gradient,
    logits,
    row_chunks,
)
from trimtab.kernels.ppo_terms import PpoSettings, RowTargets, row_losses
from trimtab.kernels.statistics import logprob_lse_entropy


def ppo(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature_N: torch.Tensor,
    softcap: float | None,
    fixed: RowTargets,
    hint_lse_N: torch.Tensor | None,
    settings: PpoSettings,
    normalizer: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """Loss (a scalar, Σ rows / normalizer), logprob and lse [N], and the loss's gradients of hidden, weight, bias.

    Args:
        hint_lse_N: not used here, see above.
        needs: which of the three gradients are wanted; the others are empty.
    """
    dtype = compute_dtype(hidden_ND)
    weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    logprob_N = hidden_ND.new_empty(len(targets_N), dtype=dtype)
    lse_N = torch.empty_like(logprob_N)
    loss = hidden_ND.new_zeros((), dtype=dtype)
    gradients = HeadGradients(hidden_ND, weight_VD, bias_V, needs)
    for rows in row_chunks(len(targets_N), weight.shape[0], dtype):
        x_CD = hidden_ND[rows].to(dtype)
        z_CV, squash_CV = logits(x_CD, weight, bias, softcap)
        statistics_4C = z_CV.new_empty((4, len(z_CV)))
        bonus = settings.entropy_coefficient != 0
        exponentials(z_CV, targets_N[rows], temperature_N[rows], statistics_4C, entropy=bonus)
        logprob_N[rows], lse_N[rows], entropy_C = logprob_lse_entropy(statistics_4C)
        loss_C, slope_C = row_losses(logprob_N[rows], fixed.at(rows), settings)
        loss += (loss_C - settings.entropy_coefficient * entropy_C).sum()
        if not any(needs):
            continue
        scale_C = 1 / (normalizer * temperature_N[rows])
        if bonus:
            h_C = -settings.entropy_coefficient * scale_C
            row_values_4C = torch.stack((entropy_C, slope_C * scale_C, torch.zeros_like(h_C), h_C))
            dz_CV, scale_C = logit_gradient(z_CV.div_(statistics_4C[1, :, None]), targets_N[rows], row_values_4C), None
        else:  # g(1[j=y] − e/S) = (e − S·1[j=y]) · (−g/S): a row's factor is left to the products
            sum_C = statistics_4C[1]
            dz_CV = z_CV.scatter_add_(1, targets_N[rows, None], -sum_C[:, None])
            scale_C = -slope_C * scale_C / sum_C
        gradients.add(rows, x_CD, weight, dz_CV if squash_CV is None else dz_CV.mul_(squash_CV), scale_C)
    return loss / normalizer, logprob_N, lse_N, *gradients.finished()

"""Exact KL(π‖ref) of two LM heads, row by row, with its gradient: chunked torch.

KL = Σ p (log p − log r) cancels when it is small: its float32 error is about 2e-6 nats, whatever its size. With the
lse of both heads known, a second pass sums p (expm1(d) − d), d = log r − log p, in which every term is ≥ 0 and the
relative error stays below 1e-3 down to 1e-4 nats. Gradient: dz_j = (p_j / T)(log p_j − log r_j − KL). Suffixes as in
`chunked_torch`; D of the reference may differ from the policy's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.kernels.chunked_torch import (
    VANISHED,
    HeadGradients,
    compute_dtype,
    exponentials,
    logit_gradient,
    logits,
    over_temperature,
    row_chunks,
)

Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]
"""hidden_ND, weight_VD, bias_V, softcap."""


def kl_forward(
    policy: Head, reference: Head, targets_N: torch.Tensor, temperature_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics [4, N] of the policy, of the reference, and KL(π‖ref) [N] in nats."""
    dtype = compute_dtype(policy[0])
    vocab_size = policy[1].shape[0]
    policy_4N = policy[0].new_empty((4, len(targets_N)), dtype=dtype)
    reference_4N, kl_N = torch.empty_like(policy_4N), torch.empty_like(policy_4N[0])
    for rows in row_chunks(len(targets_N), vocab_size, dtype, live_matrices=4):
        zs = [_chunk_logits(head, rows, temperature_N, dtype)[0] for head in (policy, reference)]
        log_ps = []
        for z_CV, out in zip(zs, (policy_4N[:, rows], reference_4N[:, rows]), strict=True):
            exponentials(z_CV.clone(), targets_N[rows], torch.ones_like(temperature_N[rows]), out)
            log_ps.append(z_CV.sub_((out[0] + out[1].log())[:, None]))
        kl_N[rows] = _divergence(*log_ps)
    return policy_4N, reference_4N, kl_N


def kl_backward(
    policy: Head,
    reference: Head,
    targets_N: torch.Tensor,
    temperature_N: torch.Tensor,
    row_values_5N: torch.Tensor,
    kl_values_3N: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the policy's hidden states, weight and bias; empty where `needs` says no.

    Args:
        row_values_5N: the policy's lse and entropy, upstream g, u, h, as in `chunked_torch.head_backward`.
        kl_values_3N: the reference's lse, KL, and the upstream of KL.
    """
    lse_N, _, g_N, u_N, h_N = row_values_5N
    reference_lse_N, kl_N, k_N = kl_values_3N
    hidden_ND, weight_VD, bias_V, _ = policy
    dtype = compute_dtype(hidden_ND)
    gradients = HeadGradients(hidden_ND, weight_VD, bias_V, needs)
    weight = weight_VD.to(dtype)
    row_values_4N = over_temperature(row_values_5N, temperature_N)
    live = ((g_N != 0) | (u_N != 0) | (h_N != 0) | (k_N != 0)).nonzero()[:, 0]
    for chunk in row_chunks(len(live), weight_VD.shape[0], dtype, live_matrices=4):
        rows = live[chunk]
        log_p_CV, squash_CV = _chunk_logits(policy, rows, temperature_N, dtype)
        log_r_CV, _ = _chunk_logits(reference, rows, temperature_N, dtype)
        log_p_CV.sub_(lse_N[rows, None])
        log_r_CV.sub_(reference_lse_N[rows, None])
        p_CV = log_p_CV.exp()
        gap_CV = log_p_CV.clamp_(min=VANISHED).sub_(log_r_CV).sub_(kl_N[rows, None])
        pull_CV = torch.where(p_CV > 0, gap_CV.mul_(p_CV), 0).mul_((k_N / temperature_N)[rows, None])
        dz_CV = logit_gradient(p_CV, targets_N[rows], row_values_4N[:, rows]).add_(pull_CV)
        x_CD = hidden_ND[rows].to(dtype)
        gradients.add(rows, x_CD, weight, dz_CV if squash_CV is None else dz_CV.mul_(squash_CV))
    return gradients.finished()


def _chunk_logits(
    head: Head, rows: slice | torch.Tensor, temperature_N: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits over temperature, and d(capped)/d(bare)."""
    hidden_ND, weight_VD, bias_V, softcap = head
    bias = None if bias_V is None else bias_V.to(dtype)
    z_CV, squash_CV = logits(hidden_ND[rows].to(dtype), weight_VD.to(dtype), bias, softcap)
    return z_CV.div_(temperature_N[rows, None]), squash_CV


def _divergence(log_p_CV: torch.Tensor, log_r_CV: torch.Tensor) -> torch.Tensor:
    """Σ p (expm1(d) − d), d = log r − log p; for d > 1, where e^d may overflow, as (r − p) − p·d. Both are ≥ 0."""
    p_CV, r_CV = log_p_CV.exp(), log_r_CV.exp()
    d_CV = log_r_CV - log_p_CV
    small_CV = p_CV * (torch.expm1(d_CV.clamp(max=1.0)) - d_CV)
    large_CV = (r_CV - p_CV) - p_CV * d_CV
    return torch.where(p_CV > 0, torch.where(d_CV > 1, large_CV, small_CV), r_CV).sum(1)

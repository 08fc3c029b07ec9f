"""What the PPO loss needs beside the policy's own term, which `kernels.ppo_terms` has.

Sums over response tokens, so that micro-batches add up to the minibatch's mean exactly.
"""

from __future__ import annotations

import torch


def importance_weights(old_R: torch.Tensor, behaviour_R: torch.Tensor, cap: float) -> torch.Tensor:
    """min(exp(old − behaviour), cap), without gradient (decoupled PPO, arXiv:2110.00641; truncation, IMPALA)."""
    return torch.exp(old_R - behaviour_R).clamp(max=cap)


@torch.no_grad()
def policy_statistics(
    logprobs_R: torch.Tensor, old_R: torch.Tensor, advantages_R: torch.Tensor, clip_range: float
) -> dict[str, float]:
    """Sums over response tokens of ratio, approx_kl (k3) and clipping, and the largest ratio."""
    log_ratio_R = logprobs_R - old_R
    ratio_R = log_ratio_R.exp()
    clipped_R = ratio_R.clamp(1 - clip_range, 1 + clip_range)
    return {
        "ratio": float(ratio_R.sum()),
        "ratio_max": float(ratio_R.max()),
        "approx_kl": float((torch.expm1(log_ratio_R) - log_ratio_R).sum()),
        "clipped_policy": float((clipped_R * advantages_R < ratio_R * advantages_R).sum()),
    }


def value_terms(
    values_R: torch.Tensor, old_values_R: torch.Tensor, returns_R: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Σ ½ max((v − R)², (clip(v, v_old ± ε) − R)²) (Ziegler 2019's code, after PPO2), and how many were clipped."""
    clipped_R = values_R.clamp(old_values_R - clip_range, old_values_R + clip_range)  # bitwise the value in between
    plain_R, bounded_R = (values_R - returns_R).square(), (clipped_R - returns_R).square()
    return 0.5 * torch.maximum(plain_R, bounded_R).sum(), {"clipped_value": float((bounded_R > plain_R).sum())}

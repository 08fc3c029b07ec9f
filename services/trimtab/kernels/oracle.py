"""The kernels' formulas in plain torch over whole [N, V] logits in float64: what every backend is compared with.

Differentiable by autograd. For small inputs only; nothing else may use it.
"""

from __future__ import annotations

import torch

from trimtab.kernels.api import ExactKl, SelectedLogprobs
from trimtab.kernels.ppo_terms import PpoSettings


def head_logits(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softcap(hidden · weightᵀ + bias) / temperature, float64 [N, V]."""
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    if bias is not None:
        logits_NV = logits_NV + bias.double()
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)


def selected(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> SelectedLogprobs:
    """logprob, lse and entropy of logits over temperature."""
    logp_NV = torch.log_softmax(logits_NV, 1)
    possible_NV = logp_NV > -torch.inf
    entropy_N = -torch.where(possible_NV, logp_NV.exp() * torch.where(possible_NV, logp_NV, 0), 0).sum(1)
    return SelectedLogprobs(logp_NV.gather(1, targets_N[:, None])[:, 0], logits_NV.logsumexp(1), entropy_N)


def two_heads(logits_NV: torch.Tensor, reference_NV: torch.Tensor, targets_N: torch.Tensor) -> ExactKl:
    """Of both heads' logits over temperature."""
    reference = selected(reference_NV, targets_N)
    logp_NV, logr_NV = torch.log_softmax(logits_NV, 1), torch.log_softmax(reference_NV, 1)
    kl_N = (logp_NV.exp() * (logp_NV - logr_NV)).sum(1)
    return ExactKl(*selected(logits_NV, targets_N), kl_N, reference.logprob_N, reference.lse_N)


def ppo(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    old_N: torch.Tensor,
    advantages_N: torch.Tensor,
    weights_N: torch.Tensor,
    reference_N: torch.Tensor,
    settings: PpoSettings,
) -> torch.Tensor:
    """Σ over rows of the loss of `ppo_terms`, written out anew."""
    logprob_N, _, entropy_N = selected(logits_NV, targets_N)
    ratio_N = torch.exp(logprob_N - old_N)
    bounded_N = torch.clamp(ratio_N, 1 - settings.clip_low, 1 + settings.clip_high)
    surrogate_N = torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    if settings.dual_clip is not None:
        dual_N = torch.maximum(surrogate_N, settings.dual_clip * advantages_N)
        surrogate_N = torch.where(advantages_N < 0, dual_N, surrogate_N)
    d_N = reference_N - logprob_N
    kl_N = d_N.square() / 2 if settings.kl_estimator == "k2" else torch.exp(d_N) - 1 - d_N
    rows_N = -weights_N * surrogate_N - settings.entropy_coefficient * entropy_N + settings.kl_coefficient * kl_N
    return rows_N.sum()

"""Estimators of KL(π‖ref) from sampled tokens, in nats (Schulman, "Approximating KL divergence", 2020).

With x ~ π and d = log ref(x) − log π(x): k1 = −d is unbiased and noisy, k2 = d²/2 is biased with little
variance, k3 = expm1(d) − d is unbiased and never negative.
"""

from __future__ import annotations

import torch


def k1(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """log π − log ref."""
    return logprobs - reference_logprobs


def k2(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """(log π − log ref)² / 2."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """expm1(d) − d with d = log ref − log π; expm1 keeps it exact when d is small."""
    d = reference_logprobs - logprobs
    return torch.expm1(d) - d

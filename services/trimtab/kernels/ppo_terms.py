"""The PPO loss as a function of one token's log-prob, with its derivative: what the fused op applies to each row.

ratio ρ = exp(logprob − old), advantage A, weight w (arXiv:1707.06347, eq. 7):
    −w · min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A)
with a dual clip c > 1 (arXiv:1912.09729, eq. 5), for A < 0 the surrogate is at least cA. A KL loss against reference
log-probs adds β·k2 or β·k3 (Schulman, "Approximating KL divergence", 2020): with d = ref − logprob, k2 = d²/2 whose
gradient is the reverse KL's on-policy, k3 = expm1(d) − d. k1 has no place here: its expected gradient is 0.
An entropy bonus subtracts c_H·H of the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch


@dataclass(frozen=True, kw_only=True)
class PpoSettings:
    """Coefficients of the loss; see the module's formulas.

    Attributes:
        dual_clip: c, above 1; None for none.
        kl_coefficient: β of the KL loss; needs reference log-probs.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    kl_estimator: Literal["k2", "k3"] = "k2"

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(f"clip_low {self.clip_low} must lie in [0, 1), clip_high {self.clip_high} be 0 or more")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1, not {self.dual_clip}")


class RowTargets(NamedTuple):
    """What each row's loss holds fixed, [N] each; `reference_N` only where the settings have a KL loss."""

    old_N: torch.Tensor
    advantages_N: torch.Tensor
    weights_N: torch.Tensor
    reference_N: torch.Tensor | None

    def at(self, rows: torch.Tensor | slice) -> RowTargets:
        return RowTargets(*(None if column is None else column[rows] for column in self))  # type: ignore[arg-type]


def row_losses(
    logprob_N: torch.Tensor, targets: RowTargets, settings: PpoSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row without the entropy bonus, and its derivative by the log-prob, [N] each."""
    old_N, advantages_N, weights_N, reference_N = targets
    ratio_N = (logprob_N - old_N).exp()
    clipped_N = ratio_N.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    plain_N, bounded_N = ratio_N * advantages_N, clipped_N * advantages_N
    surrogate_N = torch.minimum(plain_N, bounded_N)
    moves_N = plain_N <= bounded_N
    if settings.dual_clip is not None:
        floor_N = torch.where(advantages_N < 0, settings.dual_clip * advantages_N, -torch.inf)
        moves_N = moves_N & (surrogate_N >= floor_N)
        surrogate_N = torch.maximum(surrogate_N, floor_N)
    loss_N = -weights_N * surrogate_N
    slope_N = torch.where(moves_N | plain_N.isnan(), -weights_N * plain_N, 0)
    if settings.kl_coefficient and reference_N is not None:
        d_N = reference_N - logprob_N
        if settings.kl_estimator == "k2":
            loss_N = loss_N + settings.kl_coefficient * 0.5 * d_N.square()
            slope_N = slope_N - settings.kl_coefficient * d_N
        else:
            loss_N = loss_N + settings.kl_coefficient * (torch.expm1(d_N) - d_N)
            slope_N = slope_N - settings.kl_coefficient * torch.expm1(d_N)
    return loss_N, slope_N

"""Choose one token a row from logits, all rows at once, and report its log-probability.

The reported number is log_softmax(logits / temperature) over the full vocabulary, whatever top-p, top-k or min_tokens
narrowed the choice to; its sum is the one that the draw needs, in float64. The draw is by inverse CDF of one uniform
number a row, so it depends on the row's own logits and this number only. Where the tokens go is slots.py's matter.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SampleRows:
    """How to sample each of B rows; numpy arrays [B]."""

    draws: np.ndarray  # float64 in [0, 1), philox.py's for the row's seed and the token's position
    temperatures: np.ndarray  # float32, 0 = greedy
    top_ps: np.ndarray  # float32 in (0, 1]
    top_ks: np.ndarray  # int64, 0 = off


@dataclass(frozen=True)
class Sampled:
    """One token a row: ids int64 [B], log-probs float32 [B]; a row of non-finite logits has log-prob NaN."""

    token_ids: np.ndarray
    logprobs: np.ndarray


def sample(logits_BV: torch.Tensor, rows: SampleRows, banned_BV: torch.Tensor | None = None) -> Sampled:
    """Sample one token for each row of float32 logits. `banned_BV` (bool) are tokens that may not be chosen."""
    tokens_B, logprobs_B = choose(logits_BV, rows, banned_BV)
    return Sampled(tokens_B.cpu().numpy(), logprobs_B.cpu().numpy())


def choose(
    logits_BV: torch.Tensor, rows: SampleRows, banned_BV: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample`, with token ids int64 [B] and log-probs float32 [B] left on the device."""
    device = logits_BV.device
    greedy_B = rows.temperatures == 0
    divisors_B1 = torch.from_numpy(np.where(greedy_B, np.float32(1), rows.temperatures)).to(device)[:, None]
    highest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = (logits_BV - highest_B1).div_(divisors_B1).exp_()
    cdf_BV = torch.cumsum(weights_BV, dim=-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:]
    allowed_BV = logits_BV
    if banned_BV is not None:
        allowed_BV = logits_BV.masked_fill(banned_BV, -torch.inf)
        weights_BV = (allowed_BV - allowed_BV.amax(dim=-1, keepdim=True)).div_(divisors_B1).exp_()
    narrowed = np.flatnonzero((rows.top_ps < 1.0) | (rows.top_ks > 0))
    if narrowed.size:
        index = torch.from_numpy(narrowed).to(device)
        weights_BV[index] = _narrow(weights_BV[index], rows.top_ps[narrowed], rows.top_ks[narrowed])
    if banned_BV is not None or narrowed.size:
        cdf_BV = torch.cumsum(weights_BV, dim=-1, dtype=torch.float64)
    tokens_B1 = _inverse_cdf(cdf_BV, torch.from_numpy(rows.draws).to(device))
    if greedy_B.any():
        greedy_B1 = torch.from_numpy(greedy_B).to(device)[:, None]
        tokens_B1 = torch.where(greedy_B1, allowed_BV.argmax(dim=-1, keepdim=True), tokens_B1)
    shifted_B1 = (logits_BV.gather(1, tokens_B1) - highest_B1).div_(divisors_B1)
    return tokens_B1[:, 0], (shifted_B1 - total_B1.log())[:, 0].float()


def _narrow(weights_BV: torch.Tensor, top_ps: np.ndarray, top_ks: np.ndarray) -> torch.Tensor:
    """Zero what top-k, then top-p over what top-k left, cut off. The token that crosses top_p is kept."""
    vocab_size = weights_BV.shape[1]
    limits = np.where(top_ks > 0, np.minimum(top_ks, vocab_size), vocab_size)
    limit_B1 = torch.from_numpy(limits).to(weights_BV.device)[:, None]
    top_p_B1 = torch.from_numpy(top_ps.astype(np.float64)).to(weights_BV.device)[:, None]
    sorted_BV, order_BV = torch.sort(weights_BV, dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocab_size, device=weights_BV.device)
    sorted_BV = sorted_BV.masked_fill(ranks_V >= limit_B1, 0.0)
    before_BV = torch.cumsum(sorted_BV, dim=-1, dtype=torch.float64)
    total_B1 = before_BV[:, -1:]
    before_BV = before_BV - sorted_BV
    # The first rank is always kept; top_p = 1 keeps all, whatever the sums round to.
    dropped_BV = (before_BV >= top_p_B1 * total_B1) & (ranks_V > 0) & (top_p_B1 < 1)
    return torch.zeros_like(weights_BV).scatter_(1, order_BV, sorted_BV.masked_fill(dropped_BV, 0.0))


def _inverse_cdf(cdf_BV: torch.Tensor, draws_B: torch.Tensor) -> torch.Tensor:
    """The first token [B, 1] whose cumulative weight exceeds draw * total; never one of weight 0."""
    tokens_B1 = torch.searchsorted(cdf_BV, draws_B[:, None] * cdf_BV[:, -1:], right=True)
    # Only a row of NaN runs off the end; its log-prob says so.
    return tokens_B1.clamp_(max=cdf_BV.shape[1] - 1)

"""Choose one token a row from logits, all rows at once, and report its log-probability.

The reported number is log_softmax(logits / temperature) over the full vocabulary in float32, whatever top-p, top-k or
min_tokens narrowed the choice to. The draw is by inverse CDF of one uniform number a row, so it depends on the row's
own logits, seed and position only. Where the tokens go is slots.py's matter.
"""

from dataclasses import dataclass

import numpy as np
import torch

from trimtab.generator.local.philox import uniforms


@dataclass(frozen=True)
class SampleRows:
    """How to sample each of B rows; numpy arrays [B]."""

    seeds: np.ndarray  # uint64
    positions: np.ndarray  # int64, tokens sampled before this one
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
    device = logits_BV.device
    greedy_B = rows.temperatures == 0
    logits_BV = _scale(logits_BV, rows.temperatures)
    lse_B = torch.logsumexp(logits_BV, dim=-1)
    allowed_BV = logits_BV if banned_BV is None else logits_BV.masked_fill(banned_BV, -torch.inf)
    if greedy_B.all():
        tokens_B = allowed_BV.argmax(dim=-1)
    else:
        probs_BV = torch.exp(allowed_BV - lse_B[:, None])
        narrowed = np.flatnonzero((rows.top_ps < 1.0) | (rows.top_ks > 0))
        if narrowed.size:
            index = torch.from_numpy(narrowed).to(device)
            probs_BV[index] = _narrow(probs_BV[index], rows.top_ps[narrowed], rows.top_ks[narrowed])
        draws_B = torch.from_numpy(uniforms(rows.seeds, rows.positions)).to(device)
        tokens_B = _inverse_cdf(probs_BV, draws_B)
        if greedy_B.any():
            tokens_B = torch.where(torch.from_numpy(greedy_B).to(device), allowed_BV.argmax(dim=-1), tokens_B)
    logprobs_B = logits_BV.gather(1, tokens_B[:, None])[:, 0] - lse_B
    logprobs_B = torch.where(torch.isfinite(lse_B), logprobs_B, torch.nan)
    return Sampled(tokens_B.cpu().numpy(), logprobs_B.cpu().numpy())


def _scale(logits_BV: torch.Tensor, temperatures: np.ndarray) -> torch.Tensor:
    """Logits / temperature, bare for greedy rows."""
    divisors = np.where(temperatures == 0, np.float32(1), temperatures)
    if (divisors == 1).all():
        return logits_BV
    return logits_BV / torch.from_numpy(divisors).to(logits_BV.device)[:, None]


def _narrow(probs_BV: torch.Tensor, top_ps: np.ndarray, top_ks: np.ndarray) -> torch.Tensor:
    """Zero what top-k, then top-p over what top-k left, cut off. The token that crosses top_p is kept."""
    vocab_size = probs_BV.shape[1]
    limits = np.where(top_ks > 0, np.minimum(top_ks, vocab_size), vocab_size)
    limit_B1 = torch.from_numpy(limits).to(probs_BV.device)[:, None]
    top_p_B1 = torch.from_numpy(top_ps.astype(np.float64)).to(probs_BV.device)[:, None]
    sorted_BV, order_BV = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(vocab_size, device=probs_BV.device)
    sorted_BV = sorted_BV.masked_fill(ranks_V >= limit_B1, 0.0)
    before_BV = torch.cumsum(sorted_BV, dim=-1, dtype=torch.float64)
    total_B1 = before_BV[:, -1:]
    before_BV = before_BV - sorted_BV
    # The first rank is always kept; top_p = 1 keeps all, whatever the sums round to.
    dropped_BV = (before_BV >= top_p_B1 * total_B1) & (ranks_V > 0) & (top_p_B1 < 1)
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV.masked_fill(dropped_BV, 0.0))


def _inverse_cdf(probs_BV: torch.Tensor, draws_B: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability exceeds draw * total; never one of probability 0."""
    cdf_BV = torch.cumsum(probs_BV, dim=-1, dtype=torch.float64)
    targets_B1 = draws_B[:, None] * cdf_BV[:, -1:]
    tokens_B = torch.searchsorted(cdf_BV, targets_B1, right=True)[:, 0]
    # Only a row of NaN runs off the end; its log-prob says so.
    return tokens_B.clamp_(max=probs_BV.shape[1] - 1)

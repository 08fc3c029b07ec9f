"""The backend for everything but CUDA: row chunks of logits, recomputed in the backward pass.

At most `CHUNK_BYTES` of logits live at once, whatever N and V; where all rows fit into one chunk, their probabilities
are kept for the backward pass and nothing is recomputed. Arithmetic is float32 (float64 for float64
hidden states). Suffixes: N rows, D hidden size, V vocabulary, C rows of a chunk.

Statistics of a row with logits z (after bias, soft-cap and temperature): lse = log Σ eᶻ,
logprob = z_y − lse, entropy H = log S − B/S with S = Σ e^(z−m), B = Σ e^(z−m)(z−m), m = max z.
Gradient, for upstream g on logprob, u on lse, h on entropy, p = e^(z−lse):
dz_j = g(1[j=y] − p_j) + u p_j − h p_j (log p_j + H).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

CHUNK_BYTES = 64 << 20
VANISHED = -1e3
"""e^z is 0 from here down, in float64 too; z·e^z is then 0, not NaN, for a logit that is ruled out."""


class SelectedLogprobsFunction(torch.autograd.Function):
    """(hidden_ND, weight_VD, bias_V, targets_N, temperature_N, softcap) → logprob_N, lse_N, entropy_N."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        temperature_N: torch.Tensor,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = _compute_dtype(hidden_ND)
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        logprob_N = hidden_ND.new_empty(len(targets_N), dtype=dtype)
        lse_N, entropy_N = torch.empty_like(logprob_N), torch.empty_like(logprob_N)
        chunks = list(_chunks(len(targets_N), weight.shape[0], dtype))
        kept_NV = squash_CV = None
        for rows in chunks:
            z_CV, squash_CV = _logits(hidden_ND[rows].to(dtype), weight, bias, softcap)
            z_CV.div_(temperature_N[rows, None])
            m_C = z_CV.amax(1)
            target_C = z_CV.gather(1, targets_N[rows, None])[:, 0]
            z_CV.sub_(m_C[:, None])
            e_CV = z_CV.exp()
            s_C = e_CV.sum(1)
            b_C = z_CV.clamp_(min=VANISHED).mul_(e_CV).sum(1)
            log_s_C = s_C.log()
            lse_N[rows] = m_C + log_s_C
            logprob_N[rows] = (target_C - m_C) - log_s_C
            entropy_N[rows] = log_s_C - b_C / s_C
            if len(chunks) == 1 and any(ctx.needs_input_grad):
                kept_NV = e_CV.div_(s_C[:, None])
        squash_NV = None if kept_NV is None else squash_CV
        rows_N = (targets_N, temperature_N, lse_N, entropy_N)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, *rows_N, kept_NV, squash_NV)
        ctx.softcap = softcap
        return logprob_N, lse_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, temperature_N, lse_N, entropy_N, kept_NV, squash_NV = ctx.saved_tensors
        dtype = _compute_dtype(hidden_ND)
        g_N, u_N, h_N = (torch.zeros_like(lse_N) if grad is None else grad.to(dtype) for grad in upstream)
        live = ((g_N != 0) | (u_N != 0) | (h_N != 0)).nonzero()[:, 0]  # rows without gradient cost nothing
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dhidden_ND = torch.zeros_like(hidden_ND) if needs_hidden else None
        dweight_VD = torch.zeros_like(weight) if needs_weight else None
        dbias_V = torch.zeros_like(bias) if needs_bias and bias is not None else None
        for chunk in _chunks(len(live), weight.shape[0], dtype):
            rows = live[chunk]
            x_CD = hidden_ND[rows].to(dtype)
            if kept_NV is None:
                z_CV, squash_CV = _logits(x_CD, weight, bias, ctx.softcap)
                p_CV = z_CV.div_(temperature_N[rows, None]).sub_(lse_N[rows, None]).exp_()
            else:
                p_CV, squash_CV = kept_NV[rows], None if squash_NV is None else squash_NV[rows]
            dz_CV = p_CV * (u_N[rows] - g_N[rows])[:, None]
            if bool((h_N[rows] != 0).any()):
                dz_CV -= (torch.xlogy(p_CV, p_CV) + entropy_N[rows, None] * p_CV) * h_N[rows, None]
            dz_CV.scatter_add_(1, targets_N[rows, None], g_N[rows, None])
            dz_CV.div_(temperature_N[rows, None])
            if squash_CV is not None:
                dz_CV.mul_(squash_CV)
            if dhidden_ND is not None:
                dhidden_ND[rows] = (dz_CV @ weight).to(hidden_ND.dtype)
            if dweight_VD is not None:
                dweight_VD.addmm_(dz_CV.T, x_CD)
            if dbias_V is not None:
                dbias_V += dz_CV.sum(0)
        dweight = None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)
        dbias = None if dbias_V is None or bias_V is None else dbias_V.to(bias_V.dtype)
        return dhidden_ND, dweight, dbias, None, None, None


def _compute_dtype(hidden_ND: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocab_size: int, dtype: torch.dtype) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _logits(
    x_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits before temperature, and d(soft-capped)/d(bare) where there is a soft-cap."""
    with torch.autocast(x_CD.device.type, enabled=False):
        z_CV = x_CD @ weight_VD.T if bias_V is None else torch.addmm(bias_V, x_CD, weight_VD.T)
    if softcap is None:
        return z_CV, None
    squashed = torch.tanh(z_CV / softcap)
    return softcap * squashed, 1 - squashed * squashed

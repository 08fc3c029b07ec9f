"""The backend for everything but CUDA: row chunks of logits, recomputed in the backward pass.

At most `CHUNK_BYTES` of logits live at once, whatever N and V; where all rows fit into one chunk, their probabilities
are kept for the backward pass and nothing is recomputed. Arithmetic is float32 (float64 for float64
hidden states). Suffixes: N rows, D hidden size, V vocabulary, C rows of a chunk.

Gradient of a row, for upstream g on logprob, u on lse, h on entropy H, p = e^(z−lse), temperature T:
dz_j = (g(1[j=y] − p_j) + u p_j − h p_j (log p_j + H)) / T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

CHUNK_BYTES = 64 << 20
CACHED_BYTES = 1 << 20
"""What a core's cache holds. Row by row work goes over a chunk in blocks of so much, and through memory once."""
VANISHED = -1e3
"""e^z is 0 from here down, in float64 too; z·e^z is then 0, not NaN, for a logit that is ruled out."""


def head_forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature_N: torch.Tensor,
    softcap: float | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Statistics [4, N], and what the backward pass may use again: probabilities [N, V] and d(capped)/d(bare).

    The last two are empty where `keep` is off, the rows do not fit into one chunk or there is no soft-cap.
    """
    dtype = compute_dtype(hidden_ND)
    weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    statistics_4N = hidden_ND.new_empty((4, len(targets_N)), dtype=dtype)
    kept_NV, squash_NV = (hidden_ND.new_empty((0, 0), dtype=dtype) for _ in range(2))
    keep = keep and fits_one_chunk(len(targets_N), weight_VD.shape[0], dtype)
    for rows in row_chunks(len(targets_N), weight.shape[0], dtype):
        z_CV, squash_CV = logits(hidden_ND[rows].to(dtype), weight, bias, softcap)
        exponentials(z_CV, targets_N[rows], temperature_N[rows], out=statistics_4N[:, rows])
        if keep:
            kept_NV = z_CV.div_(statistics_4N[1, :, None])
            squash_NV = squash_NV if squash_CV is None else squash_CV
    return statistics_4N, kept_NV, squash_NV


def head_backward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature_N: torch.Tensor,
    softcap: float | None,
    row_values_5N: torch.Tensor,
    kept_NV: torch.Tensor,
    squash_NV: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden states, weight and bias; empty where `needs` says no.

    Args:
        row_values_5N: lse, entropy, and the upstream g, u, h of each row. Rows without upstream cost nothing.
        targets_N: outside [0, V) for a target on another rank: the row then has no one-hot term.
    """
    lse_N, _, g_N, u_N, h_N = row_values_5N
    dtype = compute_dtype(hidden_ND)
    row_values_4N = over_temperature(row_values_5N, temperature_N)
    live = ((g_N != 0) | (u_N != 0) | (h_N != 0)).nonzero()[:, 0]
    weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
    gradients = HeadGradients(hidden_ND, weight_VD, bias_V, needs)
    for chunk in row_chunks(len(live), weight.shape[0], dtype):
        rows = live[chunk]
        x_CD = hidden_ND[rows].to(dtype)
        if kept_NV.numel():
            p_CV, squash_CV = kept_NV[rows], squash_NV[rows] if squash_NV.numel() else None
            log_p_CV = None
        else:
            z_CV, squash_CV = logits(x_CD, weight, bias, softcap)
            log_p_CV = z_CV.div_(temperature_N[rows, None]).sub_(lse_N[rows, None])
            p_CV = log_p_CV.exp()
        dz_CV = logit_gradient(p_CV, targets_N[rows], row_values_4N[:, rows], log_p_CV)
        gradients.add(rows, x_CD, weight, dz_CV if squash_CV is None else dz_CV.mul_(squash_CV))
    return gradients.finished()


def logits_forward(logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """Statistics [4, N] of logits that exist already, before temperature."""
    dtype = compute_dtype(logits_NV)
    statistics_4N = logits_NV.new_empty((4, len(targets_N)), dtype=dtype)
    for rows in row_chunks(len(targets_N), logits_NV.shape[1], dtype):
        z_CV = logits_NV[rows].to(dtype, copy=True)
        exponentials(z_CV, targets_N[rows], temperature_N[rows], out=statistics_4N[:, rows])
    return statistics_4N


def logits_backward(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature_N: torch.Tensor, row_values_5N: torch.Tensor
) -> torch.Tensor:
    """Gradient [N, V] of the logits, in their dtype; `row_values_5N` as in `head_backward`."""
    lse_N, _, g_N, u_N, h_N = row_values_5N
    dtype = compute_dtype(logits_NV)
    gradient_NV = torch.zeros_like(logits_NV)
    row_values_4N = over_temperature(row_values_5N, temperature_N)
    live = ((g_N != 0) | (u_N != 0) | (h_N != 0)).nonzero()[:, 0]
    for chunk in row_chunks(len(live), logits_NV.shape[1], dtype):
        rows = live[chunk]
        p_CV = (logits_NV[rows].to(dtype) / temperature_N[rows, None]).sub_(lse_N[rows, None]).exp_()
        gradient_NV[rows] = logit_gradient(p_CV, targets_N[rows], row_values_4N[:, rows]).to(logits_NV.dtype)
    return gradient_NV


class HeadGradients:
    """Adds up the gradients of a head row chunk by row chunk, in the compute dtype; one rounding at the end."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, needs: Sequence[bool]
    ) -> None:
        dtype = compute_dtype(hidden_ND)
        self._dtypes = (hidden_ND.dtype, weight_VD.dtype, hidden_ND.dtype if bias_V is None else bias_V.dtype)
        nothing = [hidden_ND.new_empty(0, dtype=dtype) for _ in range(3)]
        self._dhidden_ND = torch.zeros_like(hidden_ND) if needs[0] else nothing[0]
        self._dweight_VD = torch.empty_like(weight_VD, dtype=dtype) if needs[1] else nothing[1]
        self._filled = False
        self._dbias_V = torch.zeros_like(bias_V, dtype=dtype) if needs[2] and bias_V is not None else nothing[2]

    def add(
        self,
        rows: torch.Tensor | slice,
        x_CD: torch.Tensor,
        weight: torch.Tensor,
        dz_CV: torch.Tensor,
        scale_C: torch.Tensor | None = None,
    ) -> None:
        """Add what the bare logits' gradient of some rows gives, `dz_CV` times `scale_C`; all in the compute dtype."""
        with torch.autocast(dz_CV.device.type, enabled=False):
            if self._dhidden_ND.numel():
                dx_CD = dz_CV @ weight
                self._dhidden_ND[rows] = (dx_CD if scale_C is None else dx_CD.mul_(scale_C[:, None])).to(
                    self._dhidden_ND.dtype
                )
            if self._dweight_VD.numel():
                scaled_CD = x_CD if scale_C is None else x_CD * scale_C[:, None]
                # With 0 what is there is not read.
                self._dweight_VD.addmm_(dz_CV.T, scaled_CD, beta=1 if self._filled else 0)
                self._filled = True
        if self._dbias_V.numel():
            self._dbias_V += dz_CV.sum(0) if scale_C is None else scale_C @ dz_CV

    def finished(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of hidden states, weight and bias, in the dtypes of what they belong to."""
        hidden, weight, bias = self._dtypes
        if not self._filled:
            self._dweight_VD.zero_()
        return self._dhidden_ND.to(hidden), self._dweight_VD.to(weight), self._dbias_V.to(bias)


def exponentials(
    z_CV: torch.Tensor,
    targets_C: torch.Tensor,
    temperature_C: torch.Tensor,
    out: torch.Tensor,
    *,
    entropy: bool = True,
) -> None:
    """Divide logits by the temperature, write m, S, B, t of each row to `out` [4, C] and leave e^(z−m) in `z_CV`.

    B, which only the entropy needs, is 0 without `entropy`.
    """
    tempered = bool((temperature_C != 1).any())
    size = max(1, CACHED_BYTES // (z_CV.shape[1] * z_CV.itemsize))
    for start in range(0, len(z_CV), size):
        rows = slice(start, start + size)
        z_BV = z_CV[rows]
        if tempered:
            z_BV.div_(temperature_C[rows, None])
        out[0, rows], out[3, rows] = shift_by_maximum(z_BV, targets_C[rows])
        shifted_BV = z_BV.clamp(min=VANISHED) if entropy else None
        out[1, rows] = z_BV.exp_().sum(1)
        out[2, rows] = 0 if shifted_BV is None else shifted_BV.mul_(z_BV).sum(1)


def shift_by_maximum(z_CV: torch.Tensor, targets_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take each row's maximum m off it, in place; returns m, and the target's logit before, −inf where not here."""
    m_C = z_CV.amax(1)
    here_C = (targets_C >= 0) & (targets_C < z_CV.shape[1])
    target_C = z_CV.gather(1, torch.where(here_C, targets_C, 0)[:, None])[:, 0]
    z_CV.sub_(torch.where(m_C == -torch.inf, 0, m_C)[:, None])  # a row with no possible column has S = 0
    return m_C, torch.where(here_C, target_C, -torch.inf)


def logit_gradient(
    p_CV: torch.Tensor, targets_C: torch.Tensor, row_values_4C: torch.Tensor, log_p_CV: torch.Tensor | None = None
) -> torch.Tensor:
    """g(1[j=y] − p) + u p − h p (log p + H), written over `p_CV`; `row_values_4C` is H, g, u, h.

    `log_p_CV`, where it is at hand, is used up.
    """
    entropy_C, g_C, u_C, h_C = row_values_4C
    bonus_CV = None
    if bool((h_C != 0).any()):
        log_p_CV = (p_CV.log() if log_p_CV is None else log_p_CV).clamp_(min=VANISHED)
        bonus_CV = log_p_CV.add_(entropy_C[:, None]).mul_(p_CV).mul_(h_C[:, None])
    dz_CV = p_CV.mul_((u_C - g_C)[:, None])
    if bonus_CV is not None:
        dz_CV.sub_(bonus_CV)
    here_C = (targets_C >= 0) & (targets_C < p_CV.shape[1])
    one_hot_C = torch.where(here_C, g_C, 0)
    return dz_CV.scatter_add_(1, torch.where(here_C, targets_C, 0)[:, None], one_hot_C[:, None])


def over_temperature(row_values_5N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """H, g/T, u/T, h/T of lse, H, g, u, h: the logits' gradient is linear in the upstream."""
    return torch.cat((row_values_5N[1:2], row_values_5N[2:] / temperature_N))


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def fits_one_chunk(rows: int, vocab_size: int, dtype: torch.dtype) -> bool:
    return 0 < rows <= _chunk_rows(vocab_size, dtype)


def row_chunks(rows: int, vocab_size: int, dtype: torch.dtype, live_matrices: int = 1) -> Iterator[slice]:
    """Rows in pieces whose `live_matrices` matrices of logits take `CHUNK_BYTES` together."""
    size = max(1, _chunk_rows(vocab_size, dtype) // live_matrices)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _chunk_rows(vocab_size: int, dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))


def logits(
    x_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits before temperature, and d(soft-capped)/d(bare) where there is a soft-cap."""
    with torch.autocast(x_CD.device.type, enabled=False):
        z_CV = x_CD @ weight_VD.T if bias_V is None else torch.addmm(bias_V, x_CD, weight_VD.T)
    if softcap is None:
        return z_CV, None
    squashed = torch.tanh(z_CV / softcap)
    return softcap * squashed, 1 - squashed * squashed

"""The PPO loss over the LM head with its gradients on GPUs: three matrix products, by the old policy's lse as a hint.

The old-log-prob pass left each row's lse; taken as an offset k, E = e^(z−k) needs no running maximum, and with S the
row sum of E: logprob = t − k − ln S. For g the loss's derivative by the log-prob, v = −g/(T S) and E' = E with S
taken off at the target, the logits' gradient is diag(v) E': dX = diag(v)(E' W), dW = E'ᵀ(diag(v) X). The same
scalar per row throughout, so both are plain products; no atomics, the same bits every run.

A hint that is off by much leaves S outside [2⁻⁶⁴, 2⁶⁴] or not finite: those rows' lse is computed and the block done
again. Without a hint, and for soft-cap and entropy bonus, whose gradient is not one scalar a row, the general path
runs: statistics, loss, backward with recomputed logits (four products).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trimtab.kernels.ppo_terms import PpoSettings, RowTargets, row_losses
from trimtab.kernels.statistics import logprob_lse_entropy
from trimtab.kernels.triton_backward import head_backward
from trimtab.kernels.triton_stats import head_forward, head_statistics
from trimtab.kernels.triton_tile import ROW_ARGUMENTS, HeadOperands, capped_logits, grouped_tile, launch, product, tiles

SCRATCH_BYTES = 1 << 30
"""Of a row chunk's E; its live rows are copied once more where not all are live."""
WEIGHT_ROWS = 16384
"""Rows of the weight's gradient that one product makes."""
TRUSTED = 2.0**64


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def exponentials_kernel(
    x_ND, w_VD, bias_ptr, N, V, D, target_ptr, inverse_temperature_ptr, hint_ptr, e_ptr, sums_ptr, t_ptr, row_tiles,
    group, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BULK_COPY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes E = e^(z−k) [N, V], its row sums per tile [column tiles, N], and the target's z − k [N]."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, tl.cdiv(V, BLOCK_V), group)  # pyright: ignore[reportGeneralTypeIssues]
    column = column_tile * BLOCK_V
    z_nv = capped_logits(
        x_ND, w_VD, bias_ptr, row_tile * BLOCK_N, N, column, V, D,
        SOFTCAP, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_D, BULK_COPY, UPCAST,
    )  # fmt: skip
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    columns = column + tl.arange(0, BLOCK_V)
    inside = columns < V
    inverse_temperature_n = tl.load(inverse_temperature_ptr + rows, mask=live, other=1.0)
    z_nv = z_nv * inverse_temperature_n[:, None] - tl.load(hint_ptr + rows, mask=live, other=0.0)[:, None]
    target_n = tl.load(target_ptr + rows, mask=live, other=-1)
    t_n = tl.sum(tl.where(columns[None, :] == target_n[:, None], z_nv, 0.0), 1)
    here_n = (target_n >= column) & (target_n < column + BLOCK_V)
    tl.store(t_ptr + rows, t_n, mask=live & here_n)
    e_nv = tl.where(inside[None, :], tl.exp(z_nv), 0.0)
    tl.store(sums_ptr + column_tile.to(tl.int64) * N + rows, tl.sum(e_nv, 1), mask=live)
    out_ptr = e_ptr + rows.to(tl.int64)[:, None] * V + columns[None, :]
    tl.store(out_ptr, e_nv.to(e_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])


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
    """As `chunked_ppo.ppo`, with the hint put to use."""
    if hint_lse_N is None or softcap is not None or settings.entropy_coefficient or not any(needs):
        head = (hidden_ND, weight_VD, bias_V, targets_N, temperature_N, softcap)
        return by_recomputation(head, fixed, settings, normalizer, needs)
    inverse_temperature_N = temperature_N.reciprocal()
    logprob_N, lse_N, loss_N = (torch.empty_like(inverse_temperature_N) for _ in range(3))
    sums = RowChunkGradients(hidden_ND, weight_VD, bias_V, needs)
    size = max(1, SCRATCH_BYTES // (len(weight_VD) * 2) // 128) * 128
    for first in range(0, len(targets_N), size):
        rows = slice(first, first + size)
        head = HeadOperands.of(hidden_ND[rows], weight_VD, bias_V, softcap)
        block = (head, targets_N[rows], inverse_temperature_N[rows])
        e_CV, s_C, t_C, hint_C = trusted_exponentials(*block, hint_lse_N[rows])
        logprob_N[rows], lse_N[rows] = t_C - s_C.log(), hint_C + s_C.log()
        loss_N[rows], slope_C = row_losses(logprob_N[rows], fixed.at(rows), settings)
        live = (slope_C != 0).nonzero()[:, 0]
        scale_C = -slope_C / normalizer * inverse_temperature_N[rows] / s_C
        own = torch.arange(len(s_C), device=s_C.device)
        e_CV[own, targets_N[rows]] -= s_C.to(e_CV.dtype)
        if len(live) < len(s_C):
            e_CV, scale_C = e_CV[live], scale_C[live]
        sums.add(live + first, e_CV, scale_C)
    return loss_N.sum() / normalizer, logprob_N, lse_N, *sums.finished()


def trusted_exponentials(
    head: HeadOperands, targets_C: torch.Tensor, inverse_temperature_C: torch.Tensor, hint_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """E [C, V], S, the target's z − k, and k [C]; rows whose hint is useless get their own lse as k."""
    e_CV, s_C, t_C = _exponentials(head, targets_C, inverse_temperature_C, hint_C)
    astray = (~((s_C > 1 / TRUSTED) & (s_C < TRUSTED))).nonzero()[:, 0]
    if len(astray):
        block = HeadOperands(head.x_ND[astray], head.weight_VD, head.bias_V, head.softcap)
        statistics_4C = head_statistics(block, targets_C[astray], inverse_temperature_C[astray])
        hint_C = hint_C.index_copy(0, astray, logprob_lse_entropy(statistics_4C)[1])
        e_CV, s_C, t_C = _exponentials(head, targets_C, inverse_temperature_C, hint_C)
    return e_CV, s_C, t_C, hint_C


def by_recomputation(
    head: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, float | None],
    fixed: RowTargets,
    settings: PpoSettings,
    normalizer: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    """The general path: statistics, the loss of each row, then the gradients of any upstream."""
    statistics_4N, *nothing = head_forward(*head, False)
    logprob_N, lse_N, entropy_N = logprob_lse_entropy(statistics_4N)
    loss_N, slope_N = row_losses(logprob_N, fixed, settings)
    loss = (loss_N - settings.entropy_coefficient * entropy_N).sum() / normalizer
    bonus_N = torch.full_like(slope_N, -settings.entropy_coefficient / normalizer)
    row_values_5N = torch.stack((lse_N, entropy_N, slope_N / normalizer, torch.zeros_like(slope_N), bonus_N))
    return loss, logprob_N, lse_N, *head_backward(*head, row_values_5N, nothing[0], nothing[1], needs)


class RowChunkGradients:
    """Adds up diag(v) E' over row chunks into the head's gradients; the weight's stays float32 until the last."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, needs: Sequence[bool]
    ) -> None:
        self._hidden_ND, self._weight_VD, self._bias_V = hidden_ND, weight_VD, bias_V
        self._dhidden_ND = torch.zeros_like(hidden_ND) if needs[0] else hidden_ND.new_empty(0)
        wide = {"dtype": torch.float32, "device": hidden_ND.device}
        self._dweight_VD = torch.zeros(weight_VD.shape if needs[1] else (0,), **wide)
        self._dbias_V = torch.zeros(len(weight_VD) if needs[2] and bias_V is not None else 0, **wide)

    def add(self, rows: torch.Tensor, e_LV: torch.Tensor, scale_L: torch.Tensor) -> None:
        """Take in some rows' E' and v."""
        if self._dhidden_ND.numel():
            dx_LD = product(e_LV, self._weight_VD) * scale_L[:, None]
            self._dhidden_ND[rows] = dx_LD.to(self._dhidden_ND.dtype)
        if self._dweight_VD.numel():
            x_LD = (self._hidden_ND[rows] * scale_L[:, None]).to(e_LV.dtype)
            for first in range(0, len(self._dweight_VD), WEIGHT_ROWS):
                columns = slice(first, first + WEIGHT_ROWS)
                self._dweight_VD[columns] += product(e_LV[:, columns].T, x_LD)
        if self._dbias_V.numel():
            self._dbias_V += (scale_L[None] @ e_LV.float())[0]

    def finished(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of hidden states, weight and bias; empty where not needed."""
        bias_dtype = self._hidden_ND.dtype if self._bias_V is None else self._bias_V.dtype
        return self._dhidden_ND, self._dweight_VD.to(self._weight_VD.dtype), self._dbias_V.to(bias_dtype)


def _exponentials(
    head: HeadOperands, targets_C: torch.Tensor, inverse_temperature_C: torch.Tensor, hint_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tile, rows = head.tile(), len(targets_C)
    row_tiles, column_tiles = head.row_tiles(tile), tiles(head.vocab_size, tile.block_v)
    e_CV = head.x_ND.new_empty((rows, head.vocab_size), dtype=head.scratch_dtype)
    sums = head.x_ND.new_empty((column_tiles, rows), dtype=torch.float32)
    t_C = torch.empty_like(sums[0])
    launch(
        exponentials_kernel, row_tiles * column_tiles, *head.arguments(tile), targets_C, inverse_temperature_C, hint_C,
        e_CV, sums, t_C, row_tiles, head.row_group(tile), **head.constants(tile), on=head.x_ND,
    )  # fmt: skip
    return e_CV, sums.sum(0), t_C

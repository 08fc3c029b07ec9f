"""Gradients of the LM head's statistics on GPUs, for any upstream: a kernel makes dz, matrix products do the rest.

Rows without upstream are left out first. The vocabulary goes in chunks of as many columns as the scratch budget holds:
a chunk's dz (bfloat16 for bfloat16 inputs) gives its rows of the weight's gradient whole, added up in float32 and
rounded once, and its part of the hidden states' gradient, which stays float32 until the last chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from trimtab.kernels.chunked_torch import over_temperature
from trimtab.kernels.triton_tile import ROW_ARGUMENTS, HeadOperands, capped_logits, grouped_tile, launch, product, tiles

SCRATCH_BYTES = 512 << 20
"""Of dz and the float32 gradient of the hidden states together; at least `MIN_COLUMNS` go into a chunk."""
MIN_COLUMNS = 1024


@triton.jit
def logit_gradient(z_nv, is_target_nv, lse_n, entropy_n, g_n, u_n, h_n):
    """g(1[j=y] − p) + u p − h p (log p + H), p = e^(z−lse); a column that is ruled out gets exactly 0."""
    log_p_nv = z_nv - lse_n[:, None]
    p_nv = tl.exp(log_p_nv)
    slope_nv = (u_n - g_n)[:, None] - h_n[:, None] * (log_p_nv + entropy_n[:, None])
    return tl.where(p_nv == 0.0, 0.0, p_nv * slope_nv) + tl.where(is_target_nv, g_n[:, None], 0.0)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def head_gradient_kernel(
    x_ND, w_VD, bias_ptr, N, V, D, target_ptr, inverse_temperature_ptr, row_values_ptr, dz_ptr, row_tiles, group,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BULK_COPY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes dz[N, V] of V columns; row_values[5, N] is lse, H, g/T, u/T, h/T."""
    row_tile, column_tile = grouped_tile(tl.program_id(0), row_tiles, tl.cdiv(V, BLOCK_V), group)  # pyright: ignore[reportGeneralTypeIssues]
    column = column_tile * BLOCK_V
    z_nv = capped_logits(
        x_ND, w_VD, bias_ptr, row_tile * BLOCK_N, N, column, V, D,
        SOFTCAP, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_D, BULK_COPY, UPCAST,
    )  # fmt: skip
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    columns = column + tl.arange(0, BLOCK_V)
    is_target_nv = columns[None, :] == tl.load(target_ptr + rows, mask=live, other=-1)[:, None]
    inverse_temperature_n = tl.load(inverse_temperature_ptr + rows, mask=live, other=1.0)
    lse_n = tl.load(row_values_ptr + rows, mask=live, other=0.0)
    entropy_n = tl.load(row_values_ptr + N + rows, mask=live, other=0.0)
    g_n = tl.load(row_values_ptr + 2 * N + rows, mask=live, other=0.0)
    u_n = tl.load(row_values_ptr + 3 * N + rows, mask=live, other=0.0)
    h_n = tl.load(row_values_ptr + 4 * N + rows, mask=live, other=0.0)
    dz_nv = logit_gradient(z_nv * inverse_temperature_n[:, None], is_target_nv, lse_n, entropy_n, g_n, u_n, h_n)
    if SOFTCAP > 0.0:
        dz_nv *= 1.0 - (z_nv / SOFTCAP) * (z_nv / SOFTCAP)
    out_ptr = dz_ptr + rows.to(tl.int64)[:, None] * V + columns[None, :]
    tl.store(out_ptr, dz_nv.to(dz_ptr.dtype.element_ty), mask=live[:, None] & (columns < V)[None, :])


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
    """As `chunked_torch.head_backward`; nothing was kept."""
    live = (row_values_5N[2:] != 0).any(0).nonzero()[:, 0]
    sums = ColumnGradients(hidden_ND, weight_VD, bias_V, live, needs)
    head = HeadOperands.of(sums.x_LD, weight_VD, bias_V, softcap)
    tile, temperature_L = head.tile(long_epilogue=True), temperature_N[live]
    row_values_5L = torch.cat((row_values_5N[:1, live], over_temperature(row_values_5N[:, live], temperature_L)))
    targets_L, inverse_temperature_L = targets_N[live], temperature_L.reciprocal()
    row_tiles = head.row_tiles(tile)
    for first, dz_LV in sums.chunks(head.scratch_dtype):
        launch(
            head_gradient_kernel, row_tiles * tiles(dz_LV.shape[1], tile.block_v),
            *head.arguments(tile, first, dz_LV.shape[1]), targets_L - first, inverse_temperature_L, row_values_5L,
            dz_LV, row_tiles, head.row_group(tile), **head.constants(tile), on=hidden_ND,
        )  # fmt: skip
        sums.add(first, dz_LV)
    return sums.finished()


class ColumnGradients:
    """Turns chunks of dz, some columns for all live rows L each, into the head's gradients."""

    def __init__(
        self,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        live: torch.Tensor,
        needs: Sequence[bool],
    ) -> None:
        self.x_LD = hidden_ND.index_select(0, live)
        self._live, self._weight_VD = live, weight_VD
        self._rows = len(live) if any(needs) else 0
        self._dx_LD = torch.zeros_like(self.x_LD, dtype=torch.float32) if needs[0] else None
        self._dhidden_ND = torch.zeros_like(hidden_ND) if needs[0] else hidden_ND.new_empty(0)
        self._dweight_VD = torch.zeros_like(weight_VD) if needs[1] else weight_VD.new_empty(0)
        like = hidden_ND if bias_V is None else bias_V
        self._dbias_V = torch.zeros_like(like) if needs[2] and bias_V is not None else like.new_empty(0)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """(first column, empty dz [L, columns]) over the vocabulary; one buffer serves all."""
        rows, width = self._rows, self.x_LD.shape[1]
        if not rows:
            return
        vocab_size = len(self._weight_VD)
        columns = (SCRATCH_BYTES - rows * width * 4) // (rows * dtype.itemsize) // MIN_COLUMNS * MIN_COLUMNS
        columns = min(vocab_size, max(MIN_COLUMNS, columns))
        buffer = self.x_LD.new_empty(rows * columns, dtype=dtype)
        for first in range(0, vocab_size, columns):
            here = min(columns, vocab_size - first)
            yield first, buffer[: rows * here].view(rows, here)

    def add(self, first: int, dz_LV: torch.Tensor) -> None:
        """Take in the gradient of the bare logits of columns from `first` on."""
        columns = slice(first, first + dz_LV.shape[1])
        if self._dx_LD is not None:
            self._dx_LD += product(dz_LV, self._weight_VD[columns])
        if self._dweight_VD.numel():
            self._dweight_VD[columns] = product(dz_LV.T, self.x_LD).to(self._dweight_VD.dtype)
        if self._dbias_V.numel():
            self._dbias_V[columns] = dz_LV.sum(0, dtype=torch.float32).to(self._dbias_V.dtype)

    def finished(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of hidden states, weight and bias; empty where not needed."""
        if self._dx_LD is not None:
            self._dhidden_ND[self._live] = self._dx_LD.to(self._dhidden_ND.dtype)
        return self._dhidden_ND, self._dweight_VD, self._dbias_V

"""Log-prob, lse and entropy of logits that exist already, on GPUs: one pass forward, one backward, a row a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimtab.kernels.chunked_torch import over_temperature
from trimtab.kernels.triton_backward import logit_gradient
from trimtab.kernels.triton_stats import merged, tile_sums
from trimtab.kernels.triton_tile import ROW_ARGUMENTS, launch, tiles

BLOCK_V = 4096
WARPS = 4


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def logit_statistics_kernel(
    logits_ptr, target_ptr, inverse_temperature_ptr, out_ptr, N, V, row_stride,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes m, S, B, t of row `program` to out[4, N]."""
    row = tl.program_id(0)
    start_ptr = logits_ptr + row.to(tl.int64) * row_stride
    target = tl.load(target_ptr + row)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    m_n = tl.full((1,), float("-inf"), tl.float32)
    s_n = tl.zeros((1,), tl.float32)
    b_n = tl.zeros((1,), tl.float32)
    t_n = tl.full((1,), float("-inf"), tl.float32)
    for column in range(0, V, BLOCK_V):
        columns = column + tl.arange(0, BLOCK_V)
        z_v = tl.load(start_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        here = (target >= column) & (target < column + BLOCK_V)
        t_n = tl.where(here, tl.sum(tl.where(columns == target, z_v, 0.0), 0), t_n)
        tile_m_n, tile_s_n, tile_b_n = tile_sums(z_v[None, :])
        m_n, s_n, b_n = merged(m_n, s_n, b_n, tile_m_n, tile_s_n, tile_b_n)
    one = tl.arange(0, 1)
    tl.store(out_ptr + row + one, m_n)
    tl.store(out_ptr + N + row + one, s_n)
    tl.store(out_ptr + 2 * N + row + one, b_n)
    tl.store(out_ptr + 3 * N + row + one, t_n)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def logit_gradient_kernel(
    logits_ptr, target_ptr, inverse_temperature_ptr, row_values_ptr, dz_ptr, N, V, row_stride, column_tiles,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_V columns of one row of dz[N, V]; row_values[5, N] is lse, H, g/T, u/T, h/T."""
    row = tl.program_id(0) // column_tiles
    columns = (tl.program_id(0) % column_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = row + tl.arange(0, 1)
    inside = columns < V
    z_v = tl.load(logits_ptr + row.to(tl.int64) * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    z_nv = z_v[None, :] * tl.load(inverse_temperature_ptr + rows)[:, None]
    dz_nv = logit_gradient(
        z_nv,
        columns[None, :] == tl.load(target_ptr + rows)[:, None],
        tl.load(row_values_ptr + rows),
        tl.load(row_values_ptr + N + rows),
        tl.load(row_values_ptr + 2 * N + rows),
        tl.load(row_values_ptr + 3 * N + rows),
        tl.load(row_values_ptr + 4 * N + rows),
    )
    out_ptr = dz_ptr + row.to(tl.int64) * V + columns[None, :]
    tl.store(out_ptr, dz_nv.to(dz_ptr.dtype.element_ty), mask=inside[None, :])


def logits_forward(logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """As `chunked_torch.logits_forward`."""
    rows, vocab_size = logits_NV.shape
    readable = _last_dim_contiguous(logits_NV)
    out = torch.empty((4, rows), dtype=torch.float32, device=logits_NV.device)
    arguments = (readable, targets_N, temperature_N.reciprocal(), out, rows, vocab_size, readable.stride(0))
    if rows:
        launch(logit_statistics_kernel, rows, *arguments, BLOCK_V=BLOCK_V, num_warps=WARPS, on=logits_NV)
    return out


def logits_backward(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature_N: torch.Tensor, row_values_5N: torch.Tensor
) -> torch.Tensor:
    """As `chunked_torch.logits_backward`; rows without upstream are computed too, they are a read and a write."""
    rows, vocab_size = logits_NV.shape
    readable = _last_dim_contiguous(logits_NV)
    row_values_5N = torch.cat((row_values_5N[:1], over_temperature(row_values_5N, temperature_N)))
    gradient_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    column_tiles = tiles(vocab_size, BLOCK_V)
    arguments = (readable, targets_N, temperature_N.reciprocal(), row_values_5N, gradient_NV)
    sizes = (rows, vocab_size, readable.stride(0), column_tiles)
    if rows:
        launch(
            logit_gradient_kernel, rows * column_tiles, *arguments, *sizes, BLOCK_V=BLOCK_V, num_warps=WARPS,
            on=logits_NV,
        )  # fmt: skip
    return gradient_NV


def _last_dim_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()

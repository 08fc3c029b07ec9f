"""Exact KL(π‖ref) of two LM heads on GPUs; the formulas are those of `chunked_kl`.

Forward, row chunks of both heads' logits come from the vendor's matrix product in float32 and one program a row
makes both heads' statistics, then the KL from the same logits while they are in the cache. Backward, the vocabulary
goes in chunks as in `triton_backward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from trimtab.kernels.chunked_kl import Head
from trimtab.kernels.chunked_torch import over_temperature
from trimtab.kernels.triton_backward import ColumnGradients, logit_gradient
from trimtab.kernels.triton_stats import merged, tile_sums
from trimtab.kernels.triton_tile import ROW_ARGUMENTS, launch, product, tiles

BLOCK_V = 4096
WARPS = 8
SCRATCH_BYTES = 512 << 20
"""Of both heads' float32 logits."""


@triton.jit
def capped(z_v, bias_ptr, columns, V, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Bias and soft-cap on bare logits."""
    if HAS_BIAS:
        z_v += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
    if SOFTCAP > 0.0:
        z_v = SOFTCAP * (2.0 * tl.sigmoid(z_v * (2.0 / SOFTCAP)) - 1.0)
    return z_v


@triton.jit
def row_statistics(
    start_ptr, bias_ptr, target, inverse_temperature, out_ptr, N, V,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes m, S, B, t of one row to out[4, N] and returns its lse."""
    m_n = tl.full((1,), float("-inf"), tl.float32)
    s_n = tl.zeros((1,), tl.float32)
    b_n = tl.zeros((1,), tl.float32)
    t_n = tl.full((1,), float("-inf"), tl.float32)
    for column in range(0, V, BLOCK_V):
        columns = column + tl.arange(0, BLOCK_V)
        z_v = tl.load(start_ptr + columns, mask=columns < V, other=0.0)
        z_v = capped(z_v, bias_ptr, columns, V, SOFTCAP, HAS_BIAS) * inverse_temperature
        z_v = tl.where(columns < V, z_v, float("-inf"))
        here = (target >= column) & (target < column + BLOCK_V)
        t_n = tl.where(here, tl.sum(tl.where(columns == target, z_v, 0.0), 0), t_n)
        tile_m_n, tile_s_n, tile_b_n = tile_sums(z_v[None, :])
        m_n, s_n, b_n = merged(m_n, s_n, b_n, tile_m_n, tile_s_n, tile_b_n)
    one = tl.arange(0, 1)
    tl.store(out_ptr + one, m_n)
    tl.store(out_ptr + N + one, s_n)
    tl.store(out_ptr + 2 * N + one, b_n)
    tl.store(out_ptr + 3 * N + one, t_n)
    return m_n + tl.log(s_n)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def kl_kernel(
    policy_ptr, reference_ptr, policy_bias_ptr, reference_bias_ptr, target_ptr, inverse_temperature_ptr,
    policy_out_ptr, reference_out_ptr, kl_ptr, N, V,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr, REFERENCE_HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics [4, N] of both heads and the KL [N] of row `program`, of bare float32 logits [rows, V]."""
    row = tl.program_id(0)
    policy_ptr += row.to(tl.int64) * V
    reference_ptr += row.to(tl.int64) * V
    target = tl.load(target_ptr + row)
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    lse_n = row_statistics(
        policy_ptr, policy_bias_ptr, target, inverse_temperature, policy_out_ptr + row, N, V,
        SOFTCAP, HAS_BIAS, BLOCK_V,
    )  # fmt: skip
    reference_lse_n = row_statistics(
        reference_ptr, reference_bias_ptr, target, inverse_temperature, reference_out_ptr + row, N, V,
        REFERENCE_SOFTCAP, REFERENCE_HAS_BIAS, BLOCK_V,
    )  # fmt: skip
    kl_n = tl.zeros((1,), tl.float32)
    for column in range(0, V, BLOCK_V):
        columns = column + tl.arange(0, BLOCK_V)
        inside = columns < V
        z_v = tl.load(policy_ptr + columns, mask=inside, other=0.0)
        r_v = tl.load(reference_ptr + columns, mask=inside, other=0.0)
        log_p_v = capped(z_v, policy_bias_ptr, columns, V, SOFTCAP, HAS_BIAS) * inverse_temperature - lse_n
        log_r_v = capped(r_v, reference_bias_ptr, columns, V, REFERENCE_SOFTCAP, REFERENCE_HAS_BIAS)
        log_r_v = log_r_v * inverse_temperature - reference_lse_n
        p_v, r_v = tl.exp(log_p_v), tl.exp(log_r_v)
        d_v = log_r_v - log_p_v
        series_v = d_v * d_v * (0.5 + d_v * (1.0 / 6.0 + d_v * (1.0 / 24.0 + d_v * (1.0 / 120.0 + d_v / 720.0))))
        small_v = p_v * tl.where(tl.abs(d_v) < 0.25, series_v, tl.exp(tl.minimum(d_v, 1.0)) - 1.0 - d_v)
        term_v = tl.where(d_v > 1.0, (r_v - p_v) - p_v * d_v, small_v)
        kl_n += tl.sum(tl.where(inside, tl.where(p_v == 0.0, r_v, term_v), 0.0), 0)
    tl.store(kl_ptr + row + tl.arange(0, 1), kl_n)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def kl_gradient_kernel(
    policy_ptr, reference_ptr, policy_bias_ptr, reference_bias_ptr, target_ptr, inverse_temperature_ptr,
    row_values_ptr, kl_values_ptr, dz_ptr, N, V, column_tiles,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, REFERENCE_SOFTCAP: tl.constexpr, REFERENCE_HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK_V columns of a row of dz[N, V]; row values as in `triton_backward`, KL's: lse_r, KL, k/T."""
    row = tl.program_id(0) // column_tiles
    columns = (tl.program_id(0) % column_tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = row + tl.arange(0, 1)
    inside = columns < V
    offset = row.to(tl.int64) * V + columns
    inverse_temperature = tl.load(inverse_temperature_ptr + row)
    z_v = tl.load(policy_ptr + offset, mask=inside, other=0.0)
    z_v = capped(z_v, policy_bias_ptr, columns, V, SOFTCAP, HAS_BIAS)
    r_v = tl.load(reference_ptr + offset, mask=inside, other=0.0)
    r_v = capped(r_v, reference_bias_ptr, columns, V, REFERENCE_SOFTCAP, REFERENCE_HAS_BIAS)
    lse_n = tl.load(row_values_ptr + rows)
    dz_nv = logit_gradient(
        z_v[None, :] * inverse_temperature,
        columns[None, :] == tl.load(target_ptr + rows)[:, None],
        lse_n,
        tl.load(row_values_ptr + N + rows),
        tl.load(row_values_ptr + 2 * N + rows),
        tl.load(row_values_ptr + 3 * N + rows),
        tl.load(row_values_ptr + 4 * N + rows),
    )
    log_p_v = z_v * inverse_temperature - lse_n
    log_r_v = r_v * inverse_temperature - tl.load(kl_values_ptr + rows)
    p_v = tl.exp(log_p_v)
    pull_v = p_v * (log_p_v - log_r_v - tl.load(kl_values_ptr + N + rows)) * tl.load(kl_values_ptr + 2 * N + rows)
    dz_nv += tl.where(p_v == 0.0, 0.0, pull_v)[None, :]
    if SOFTCAP > 0.0:
        dz_nv *= 1.0 - (z_v / SOFTCAP * (z_v / SOFTCAP))[None, :]
    tl.store(dz_ptr + offset[None, :], dz_nv.to(dz_ptr.dtype.element_ty), mask=inside[None, :])


def kl_forward(
    policy: Head, reference: Head, targets_N: torch.Tensor, temperature_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `chunked_kl.kl_forward`."""
    rows, vocab_size = len(targets_N), len(policy[1])
    outs = [torch.empty((4, rows), dtype=torch.float32, device=targets_N.device) for _ in range(2)]
    kl_N = torch.empty_like(outs[0][0])
    size = max(1, SCRATCH_BYTES // (vocab_size * 8))
    for first in range(0, rows, size):
        chunk = slice(first, first + size)
        zs = [product(hidden_ND[chunk], weight_VD.T) for hidden_ND, weight_VD, *_ in (policy, reference)]
        biases = [z if head[2] is None else head[2] for z, head in zip(zs, (policy, reference), strict=True)]
        columns = (targets_N[chunk].contiguous(), temperature_N[chunk].reciprocal())
        here = [out[:, first:] for out in outs]  # rows keep their stride of N
        launch(
            kl_kernel, len(zs[0]), *zs, *biases, *columns, *here, kl_N[first:], rows, vocab_size,
            **_constants(policy, reference), on=targets_N,
        )  # fmt: skip
    return outs[0], outs[1], kl_N


def kl_backward(
    policy: Head,
    reference: Head,
    targets_N: torch.Tensor,
    temperature_N: torch.Tensor,
    row_values_5N: torch.Tensor,
    kl_values_3N: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `chunked_kl.kl_backward`."""
    hidden_ND, weight_VD, bias_V, _ = policy
    live = ((row_values_5N[2:] != 0).any(0) | (kl_values_3N[2] != 0)).nonzero()[:, 0]
    sums = ColumnGradients(hidden_ND, weight_VD, bias_V, live, needs)
    temperature_L = temperature_N[live]
    row_values_5L = torch.cat((row_values_5N[:1, live], over_temperature(row_values_5N[:, live], temperature_L)))
    kl_values_3L = torch.cat((kl_values_3N[:2, live], kl_values_3N[2:, live] / temperature_L))
    columns = (targets_N[live], temperature_L.reciprocal())
    reference_LD = reference[0].index_select(0, live)
    for first, dz_LV in sums.chunks(torch.float32 if hidden_ND.dtype != torch.bfloat16 else torch.bfloat16):
        here = slice(first, first + dz_LV.shape[1])
        zs = [product(x_LD, head[1][here].T) for x_LD, head in ((sums.x_LD, policy), (reference_LD, reference))]
        biases = [z if head[2] is None else head[2][here] for z, head in zip(zs, (policy, reference), strict=True)]
        column_tiles = tiles(dz_LV.shape[1], BLOCK_V)
        launch(
            kl_gradient_kernel, len(live) * column_tiles, *zs, *biases, columns[0] - first, columns[1],
            row_values_5L, kl_values_3L, dz_LV, len(live), dz_LV.shape[1], column_tiles,
            **_constants(policy, reference), on=targets_N,
        )  # fmt: skip
        sums.add(first, dz_LV)
    return sums.finished()


def _constants(policy: Head, reference: Head) -> dict[str, object]:
    return {
        "SOFTCAP": policy[3] or 0.0,
        "HAS_BIAS": policy[2] is not None,
        "REFERENCE_SOFTCAP": reference[3] or 0.0,
        "REFERENCE_HAS_BIAS": reference[2] is not None,
        "BLOCK_V": BLOCK_V,
        "num_warps": WARPS,
    }

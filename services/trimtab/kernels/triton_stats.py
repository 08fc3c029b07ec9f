"""Forward statistics of LM-head rows on GPUs, without a logit in memory.

A program walks its fixed share of the vocabulary and keeps four floats a row: the maximum m, S = Σ e^(z−m),
B = Σ e^(z−m)(z−m), and the target's logit t; a second kernel merges the shares in order. With m' the new maximum and
c = e^(m−m'): B ← c(B + (m−m')S), S ← cS. Then lse = m + ln S, logprob = (t−m) − ln S, entropy H = ln S − B/S, in
which no large numbers cancel (unshifted sums lose two digits).

The vocabulary is cut in `SPLITS` whatever N is: 16 · 16 bytes a row, flat in V, and the same sums in any company.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trimtab.kernels.triton_tile import ROW_ARGUMENTS, HeadOperands, capped_logits, grouped_tile, launch, tiles

SPLITS = 16
MERGE_ROWS = 256


@triton.jit
def merged(m, s, b, new_m, new_s, new_b):
    """(m, S, B) of two disjoint sets of logits together; an empty set or one of all −inf counts nothing."""
    top = tl.maximum(m, new_m)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    old_shift = tl.where(m == float("-inf"), 0.0, m - safe_top)
    new_shift = tl.where(new_m == float("-inf"), 0.0, new_m - safe_top)
    old_scale = tl.where(m == float("-inf"), 0.0, tl.exp(old_shift))
    new_scale = tl.where(new_m == float("-inf"), 0.0, tl.exp(new_shift))
    b = old_scale * (b + old_shift * s) + new_scale * (new_b + new_shift * new_s)
    return top, old_scale * s + new_scale * new_s, b


@triton.jit
def tile_sums(z_nv):
    """(m, S, B) of each row of a tile. A NaN leaves its row NaN: the maximum skips it, the sum does not."""
    m_n = tl.max(z_nv, 1)
    dz_nv = z_nv - tl.where(m_n == float("-inf"), 0.0, m_n)[:, None]
    e_nv = tl.exp(dz_nv)
    return m_n, tl.sum(e_nv, 1), tl.sum(tl.where(e_nv > 0.0, e_nv * dz_nv, 0.0), 1)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def head_statistics_kernel(
    x_ND, w_VD, bias_ptr, N, V, D, target_ptr, inverse_temperature_ptr, partial_ptr, split_width, row_tiles, group,
    SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BULK_COPY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes m, S, B, t of each row's share of the vocabulary to partial[split, 4, N]."""
    row_tile, split = grouped_tile(tl.program_id(0), row_tiles, SPLITS, group)  # pyright: ignore[reportGeneralTypeIssues]
    rows = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    target_n = tl.load(target_ptr + rows, mask=live, other=-1)
    inverse_temperature_n = tl.load(inverse_temperature_ptr + rows, mask=live, other=1.0)
    m_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s_n = tl.zeros((BLOCK_N,), tl.float32)
    b_n = tl.zeros((BLOCK_N,), tl.float32)
    t_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for column in range(split * split_width, tl.minimum((split + 1) * split_width, V), BLOCK_V):
        z_nv = capped_logits(
            x_ND, w_VD, bias_ptr, row_tile * BLOCK_N, N, column, V, D,
            SOFTCAP, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_D, BULK_COPY, UPCAST,
        )  # fmt: skip
        columns = column + tl.arange(0, BLOCK_V)
        z_nv = tl.where((columns < V)[None, :], z_nv * inverse_temperature_n[:, None], float("-inf"))
        is_target_nv = columns[None, :] == target_n[:, None]
        here_n = (target_n >= column) & (target_n < column + BLOCK_V)
        t_n = tl.where(here_n, tl.sum(tl.where(is_target_nv, z_nv, 0.0), 1), t_n)
        tile_m_n, tile_s_n, tile_b_n = tile_sums(z_nv)
        m_n, s_n, b_n = merged(m_n, s_n, b_n, tile_m_n, tile_s_n, tile_b_n)
    out_ptr = partial_ptr + split.to(tl.int64) * 4 * N + rows
    tl.store(out_ptr, m_n, mask=live)
    tl.store(out_ptr + N, s_n, mask=live)
    tl.store(out_ptr + 2 * N, b_n, mask=live)
    tl.store(out_ptr + 3 * N, t_n, mask=live)


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def merge_kernel(partial_ptr, out_ptr, N, splits, BLOCK_N: tl.constexpr):
    """Merges partial[splits, 4, N] in order into out[4, N]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    m_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s_n = tl.zeros((BLOCK_N,), tl.float32)
    b_n = tl.zeros((BLOCK_N,), tl.float32)
    t_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    part_ptr = partial_ptr + rows
    for _ in range(splits):
        new_m_n = tl.load(part_ptr, mask=live, other=0.0)
        new_s_n = tl.load(part_ptr + N, mask=live, other=1.0)
        new_b_n = tl.load(part_ptr + 2 * N, mask=live, other=0.0)
        new_t_n = tl.load(part_ptr + 3 * N, mask=live, other=0.0)
        m_n, s_n, b_n = merged(m_n, s_n, b_n, new_m_n, new_s_n, new_b_n)
        t_n = tl.where(new_t_n == float("-inf"), t_n, new_t_n)
        part_ptr += 4 * N
    tl.store(out_ptr + rows, m_n, mask=live)
    tl.store(out_ptr + N + rows, s_n, mask=live)
    tl.store(out_ptr + 2 * N + rows, b_n, mask=live)
    tl.store(out_ptr + 3 * N + rows, t_n, mask=live)


def head_forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature_N: torch.Tensor,
    softcap: float | None,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `chunked_torch.head_forward`; nothing is ever kept, the backward pass makes its logits anew."""
    nothing = [hidden_ND.new_empty((0, 0), dtype=torch.float32) for _ in range(2)]
    head = HeadOperands.of(hidden_ND, weight_VD, bias_V, softcap)
    return head_statistics(head, targets_N, temperature_N.reciprocal()), nothing[0], nothing[1]


def head_statistics(head: HeadOperands, targets_N: torch.Tensor, inverse_temperature_N: torch.Tensor) -> torch.Tensor:
    """m, S, B, t of each row over the head's columns, float32 [4, N]; t is −inf where the target is not among them."""
    rows, tile = len(targets_N), head.tile()
    partial = torch.empty((SPLITS, 4, rows), dtype=torch.float32, device=head.x_ND.device)
    out = torch.empty((4, rows), dtype=torch.float32, device=head.x_ND.device)
    if not rows:
        return out
    split_width = tiles(tiles(head.vocab_size, SPLITS), tile.block_v) * tile.block_v
    row_tiles = head.row_tiles(tile)
    launch(
        head_statistics_kernel, row_tiles * SPLITS, *head.arguments(tile), targets_N, inverse_temperature_N, partial,
        split_width, row_tiles, head.row_group(tile), SPLITS=SPLITS, **head.constants(tile), on=head.x_ND,
    )  # fmt: skip
    merges = tiles(rows, MERGE_ROWS)
    launch(merge_kernel, merges, partial, out, rows, SPLITS, BLOCK_N=MERGE_ROWS, on=head.x_ND)
    return out

"""The four numbers a row of logits z is known by: m = max z, S = Σ e^(z−m), B = Σ e^(z−m)(z−m), and the target's t.

They are a [4, N] tensor, m S B t in this order; t is −inf where the target is not among the columns. Two sets of
columns merge exactly (shifted sums, as in online softmax, Milakov & Gimelshein 2018, with B added), so a vocabulary
may lie on several ranks.
"""

from __future__ import annotations

import torch


def logprob_lse_entropy(statistics_4N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprob = (t−m) − ln S, lse = m + ln S, H = ln S − B/S, each [N], in nats; no large numbers cancel."""
    m_N, s_N, b_N, t_N = statistics_4N
    log_s_N = s_N.log()
    return (t_N - m_N) - log_s_N, m_N + log_s_N, log_s_N - b_N / s_N


def merged(parts_R4N: torch.Tensor) -> torch.Tensor:
    """Statistics of disjoint sets of columns, merged one after the other: the order fixes the bits."""
    total_4N = parts_R4N[0]
    for part_4N in parts_R4N[1:]:
        m_N = torch.maximum(total_4N[0], part_4N[0])
        s_N, b_N = torch.zeros_like(m_N), torch.zeros_like(m_N)
        for side_m_N, side_s_N, side_b_N in (total_4N[:3], part_4N[:3]):
            ruled_out_N = side_m_N == -torch.inf  # none of these columns is possible: they add nothing
            shift_N = torch.where(ruled_out_N, 0, side_m_N - m_N)
            scale_N = torch.where(ruled_out_N, 0, shift_N.exp())
            s_N = s_N + scale_N * side_s_N
            b_N = b_N + scale_N * (side_b_N + shift_N * side_s_N)
        t_N = torch.where(part_4N[3] == -torch.inf, total_4N[3], part_4N[3])
        total_4N = torch.stack((m_N, s_N, b_N, t_N))
    return total_4N

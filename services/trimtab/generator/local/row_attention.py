"""Attention over a row cache on a CPU: one token a row against its past, and the tokens of prompts among themselves.

One query a row against its cached keys is two small batched products; as such they run faster on most CPUs than torch's
fused kernel, which is made for long queries and takes the prompts. Apart, in deterministic mode, every row is computed
in a shape that its own length decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch.nn import functional

from trimtab.generator.local.row_cache import COLUMN_BUCKET, RowCache
from trimtab.models.cpu import has_amx, is_intel
from trimtab.models.llama import HeadShape

Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, queries, keys and values side by side [N, heads and twice key heads, head_dim]) → [N, H · head_dim]."""


@dataclass(frozen=True)
class Span:
    """Tokens that are computed for one row: its columns from `start` on; int32 ids."""

    row: int
    start: int
    token_ids: np.ndarray


def side_by_side(count: int, first: Attend, rest: Attend) -> Attend:
    """`first` of the first `count` tokens, `rest` of those behind them."""

    def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
        return torch.cat((first(layer, qkv[:count]), rest(layer, qkv[count:])))

    return attend


class RowAttention:
    """Attention of a forward's tokens, which it first writes into the cache."""

    def __init__(self, cache: RowCache, shape: HeadShape, *, apart: bool) -> None:
        self._cache = cache
        self._shape = shape
        self._apart = apart
        self._nothing = torch.zeros(1, dtype=shape.dtype)
        self._fuses = shape.dtype is torch.bfloat16 and has_amx()

    def to_past(self, lengths_B: np.ndarray) -> Attend:
        """For one token a row: to the row's columns [0, length], its own among them."""
        shape, cache, rows = self._shape, self._cache, len(lengths_B)
        slots, groups = cache.slots(lengths_B), self._widths(lengths_B)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            q, kv = qkv.split((shape.heads, 2 * shape.key_heads), dim=1)
            cache.write(layer, slots, kv)
            if len(groups) == 1:
                _, width, bias = groups[0]
                return self._one_token(q, *cache.past(layer, rows, width), bias)
            attended = q.new_empty(rows, shape.heads * shape.head_dim)
            for of, width, bias in groups:
                keys, values = cache.keys(layer)[of, :, :width], cache.values(layer)[of, :, :width]
                attended[of] = self._one_token(q[of], keys.flatten(0, 1), values.flatten(0, 1), bias)
            return attended

        return attend

    def _widths(self, lengths_B: np.ndarray) -> list[tuple[torch.Tensor, int, torch.Tensor | None]]:
        """Rows that are computed together, how many columns of them, and what is added to the scores."""
        ends_B = lengths_B + 1
        widths_B = np.full_like(ends_B, ends_B.max())
        if self._apart:
            widths_B = -(-ends_B // COLUMN_BUCKET) * COLUMN_BUCKET
        groups = []
        for width in np.unique(widths_B).tolist():
            of = np.flatnonzero(widths_B == width)
            bias = None
            if self._apart or (ends_B[of] != width).any():
                outside = torch.from_numpy(np.arange(width) >= ends_B[of, None])[:, None]
                bias = torch.zeros(len(of), 1, width, dtype=self._shape.dtype).masked_fill_(outside, -torch.inf)
                bias = bias.repeat_interleave(self._shape.key_heads, 0)
            groups.append((torch.from_numpy(of), width, bias))
        return groups

    def _one_token(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """q [B, H, head_dim], keys and values [B · key heads, width, head_dim] → [B, H · head_dim]."""
        shape, rows = self._shape, len(q)
        group = shape.heads // shape.key_heads
        if self._fuses:
            q = q.reshape(rows, shape.key_heads, group, shape.head_dim)
            mask = None if bias is None else bias.view(rows, shape.key_heads, 1, -1)
            keys, values = keys.unflatten(0, (rows, -1)), values.unflatten(0, (rows, -1))
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            return out.reshape(rows, -1)
        if shape.dtype is torch.bfloat16 and group > 1:
            keys = keys.contiguous()  # oneDNN would copy it transposed, which takes thrice as long
        q = q.reshape(rows * shape.key_heads, group, shape.head_dim)
        start = self._nothing if bias is None else bias.expand(-1, group, -1)
        options = {"beta": 0 if bias is None else 1, "alpha": shape.head_dim**-0.5}
        # A matrix times a vector takes less than the vector times the transposed matrix, but not in Intel's MKL.
        if group == 1 and not is_intel():
            start = start if bias is None else start.transpose(1, 2)
            scores = torch.baddbmm(start, keys, q.transpose(1, 2), **options).transpose(1, 2)
        else:
            scores = torch.baddbmm(start, q, keys.transpose(1, 2), **options)
        shares = torch.softmax(scores, -1, dtype=torch.float32).to(shape.dtype)
        return torch.bmm(shares, values).view(rows, -1)

    def in_spans(self, spans: Sequence[Span]) -> Attend:
        """For each span's tokens: to their row up to themselves. Spans of one shape stand side by side."""
        # Apart, one at a time: whether torch's kernel packs its inputs depends on how many there are.
        shapes = [(span.start, len(span.token_ids), index * self._apart) for index, span in enumerate(spans)]
        groups = [(start, length, len(list(members))) for (start, length, _), members in groupby(shapes)]
        rows_B = torch.tensor([span.row for span in spans])

        heads = (self._shape.heads, self._shape.key_heads, self._shape.key_heads)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            attended, first, token = [], 0, 0
            for start, length, count in groups:
                rows, tokens = rows_B[first : first + count], slice(token, token + count * length)
                parts = qkv[tokens].unflatten(0, (count, length)).transpose(1, 2).split(heads, dim=1)
                attended.append(self._prompt_tokens(layer, rows, start, *parts))
                first, token = first + count, token + count * length
            return attended[0] if len(attended) == 1 else torch.cat(attended)

        return attend

    def _prompt_tokens(
        self, layer: int, rows: torch.Tensor, start: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q [B, H, T, head_dim], k and v [B, key heads, T, head_dim] from column `start` on → [B · T, H · head_dim]."""
        length, columns = q.shape[2], slice(start, start + q.shape[2])
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        keys[rows, :, columns], values[rows, :, columns] = k, v
        mask = None
        if start:
            k, v = keys[rows, :, : columns.stop], values[rows, :, : columns.stop]
            mask = torch.arange(columns.stop) <= torch.arange(start, columns.stop)[:, None]
        if (group := q.shape[1] // k.shape[1]) > 1:
            k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        if self._apart:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # wherever they lay among the others
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and length > 1)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

"""Causal attention over a packed row, registered with transformers as "trimtab_packed".

Each sequence attends to itself only. Sequences of similar length run as one dense causal batch
(`packing.AttentionGroup`), which is exact: a causal mask hides what stands behind a short sequence. Where sequences
share their beginning, its keys and values go to each of them and its queries run once.
Suffixes: B sequences, T tokens of one as keys, Q of them as queries, H heads, d size of a head; N and M as in packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from trimtab.models.cpu import fuses_attention
from trimtab.models.packing import PackedBatch

NAME = "trimtab_packed"
SHORT_ON_CPU = 256
"""Up to this many tokens plain matrix products beat torch's CPU flash attention, whose backward pass takes a quarter
of a training step of a small model at 96 tokens; not where `cpu.fuses_attention`."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packed: PackedBatch | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one packed row: query [1, H, N, d], key and value [1, H_kv, N, d] → [1, N, H, d]."""
    if packed is None or attention_mask is not None:
        raise ValueError("a packed forward takes `packed` and no attention mask")
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__}: attention sinks are not supported in a packed forward")
    repeats = query.shape[1] // key.shape[1]
    # The same way with gradients and without: the first minibatch's ratios are 1 to the bit.
    fuses = query.device.type != "cpu" or fuses_attention(query.dtype, gradients=True)
    groups, token_count = packed.groups, len(packed.token_ids_N)
    asked, seen = [g.count * g.queries for g in groups], [g.count * g.length for g in groups]
    places_of_keys = None if packed.shares else packed.places_N
    pieces = []
    for group, *parts in zip(
        groups,
        _split(_spread(query[0], token_count, packed.queries_M, packed.places_N), asked),
        _split(_spread(key[0], token_count, packed.keys_M, places_of_keys), seen),
        _split(_spread(value[0], token_count, packed.keys_M, places_of_keys), seen),
        strict=True,
    ):
        q, k, v = (part.unflatten(1, (group.count, -1)) for part in parts)  # [H, B, Q or T, d]
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
        short = not fuses and group.length <= SHORT_ON_CPU
        attend = partial(_matrix_products, softcap=softcap) if short or softcap is not None else _fused
        out = attend(q, k, v, scaling, dropout, sliding_window)  # [H, B, Q, d]
        pieces.append(out.permute(1, 2, 0, 3).reshape(-1, out.shape[0], out.shape[3]))  # [B·Q, H, d]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if packed.places_N is not None:
        rows = rows.index_select(0, packed.places_N)
    return _as_long(rows, query.shape[2]), None


def _as_long(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[N, H, d] → [1, count, H, d], zeros behind the packed tokens (see `policy.body_forward`)."""
    if len(rows) < count:  # padding by nothing would copy
        rows = F.pad(rows, (0, 0, 0, 0, 0, count - len(rows)))
    return rows.unsqueeze(0)


class Spread(torch.autograd.Function):
    """Columns `index_M` of x [H, N, d]: [H, M, d].

    Backward each token takes the gradient of its one place in `places_N`: elsewhere it pads, where the gradient is 0.
    Without `places_N` the gradients of all its places are added, along the first dimension: along the second torch
    takes several times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index_M: torch.Tensor, places_N: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(index_M, places_N)
        ctx.width = x.shape[1]
        return x.index_select(1, index_M)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (g,), (index_M, places_N) = upstream, ctx.saved_tensors
        if places_N is None:
            zeros = g.new_zeros(ctx.width, g.shape[0], g.shape[2])
            return zeros.index_add_(0, index_M, g.transpose(0, 1)).transpose(0, 1), None, None
        dx = g.new_empty(g.shape[0], ctx.width, g.shape[2])
        torch.index_select(g, 1, places_N, out=dx[:, : len(places_N)])
        dx[:, len(places_N) :] = 0
        return dx, None, None


def _spread(
    x: torch.Tensor, token_count: int, index_M: torch.Tensor | None, places_N: torch.Tensor | None
) -> torch.Tensor:
    """[H, at least N, d] → [H, M, d], the row's tokens where the groups want them; None: the row is as they want."""
    if index_M is not None:
        spread: Any = Spread.apply(x, index_M, places_N)
        return spread
    return x if x.shape[1] == token_count else x[:, :token_count]


def _split(x: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Parts of the second dimension; the gradient of a single one is not copied."""
    return x.split(list(sizes), 1) if len(sizes) > 1 else [x]


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Torch's own kernel: q [H, B, Q, d] are the last Q of the T tokens that k and v [H, B, T, d] stand for."""
    queries, length = q.shape[2], k.shape[2]
    if queries == length and (sliding_window is None or length <= sliding_window):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
    visible = ~_hidden(queries, length, length if sliding_window is None else sliding_window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scaling)


def _matrix_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(q kᵀ · scaling) v, the hidden places' −∞ added by the product itself; softmax sums in float32."""
    window = k.shape[2] if sliding_window is None else sliding_window
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = (tensor.reshape(-1, *tensor.shape[2:]) for tensor in (q, k, v))  # [H·B, Q or T, d]
    hidden = _hidden(q.shape[2], k.shape[2], window, q.device)
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    if softcap is None:
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
    else:
        bare = torch.bmm(queries, keys.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
        scores = softcap * torch.tanh(bare * (scale / softcap)) + bias  # Gemma 2 (arXiv:2408.00118, section 2)
    weights = F.softmax(scores, dim=-1).to(q.dtype)
    out = torch.bmm(F.dropout(weights, dropout) if dropout else weights, values)
    return out.view(*q.shape[:3], -1)


def _hidden(queries: int, length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of [query, key] may not be seen by the last `queries` of `length` tokens: later ones, and those `window` or
    more tokens back."""
    places = torch.arange(length, device=device)
    distance = places[length - queries :, None] - places[None, :]
    return (distance < 0) | (distance >= window)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says who sees whom; transformers builds no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)  # type: ignore[arg-type]

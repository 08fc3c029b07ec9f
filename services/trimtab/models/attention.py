"""Causal attention over a packed row, registered with transformers as "trimtab_packed".

Each sequence attends to itself only. Sequences of similar length run as one dense causal batch
(`packing.AttentionGroup`), which is exact: a causal mask hides what stands behind a short sequence. Where sequences
share their beginning, its keys and values go to each of them and its queries run once.
Suffixes: B sequences, T tokens of one as keys, Q of them as queries, H heads, d size of a head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from trimtab.models.cpu import fuses_attention
from trimtab.models.packing import AttentionGroup, PackedBatch

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
    pieces = []
    for group in packed.groups:
        q = _gather(query, group, group.first_query)
        k, v = _gather(key, group), _gather(value, group)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
        short = not fuses and group.shape[1] <= SHORT_ON_CPU
        attend = partial(_matrix_products, softcap=softcap) if short or softcap is not None else _fused
        out = attend(q, k, v, scaling, dropout, sliding_window)  # [H, B, Q, d]
        flat = out.permute(1, 2, 0, 3).reshape(-1, out.shape[0], out.shape[3])  # [B·Q, H, d]
        pieces.append(flat if group.valid is None else flat.index_select(0, group.valid))
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if packed.order is not None:
        rows = rows.index_select(0, packed.order)
    return _as_long(rows, query.shape[2]), None


def _as_long(rows: torch.Tensor, count: int) -> torch.Tensor:
    """[N, H, d] → [1, count, H, d], zeros behind the packed tokens (see `policy.body_forward`)."""
    if len(rows) < count:  # padding by nothing would copy
        rows = F.pad(rows, (0, 0, 0, 0, 0, count - len(rows)))
    return rows.unsqueeze(0)


def _gather(tensor: torch.Tensor, group: AttentionGroup, first: int = 0) -> torch.Tensor:
    """[1, H, N, d] → [H, B, T − first, d] of one group: heads stay in front, where the model put them, not copied."""
    count, length = group.shape
    if group.contiguous_start is not None and first == group.first_query:
        rows = tensor[0, :, group.contiguous_start : group.contiguous_start + count * (length - first)]
    else:
        rows = tensor[0].index_select(1, group.gather_BT[:, first:].reshape(-1))
    return rows.unflatten(1, (count, length - first))


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

"""Causal attention over a packed row, registered with transformers as "trimtab_packed".

Each sequence attends to itself only. Sequences of similar length run as one dense causal batch
(`packing.AttentionGroup`), which is exact: a causal mask hides what stands behind a short sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from trimtab.models.packing import PackedBatch

NAME = "trimtab_packed"
SHORT_ON_CPU = 256
"""Up to this many tokens plain matrix products beat torch's CPU flash attention, whose backward pass takes a quarter
of a training step of a small model at 96 tokens."""


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
    pieces = []
    for group in packed.groups:
        q, k, v = (_gather(tensor, group) for tensor in (query, key, value))
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)
        out = _causal(q, k, v, scaling, dropout, sliding_window, softcap)  # [H, B, T, d]
        flat = out.permute(1, 2, 0, 3).reshape(-1, out.shape[0], out.shape[3])  # [B·T, H, d]
        pieces.append(flat if group.valid is None else flat.index_select(0, group.valid))
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if packed.order is not None:
        rows = rows.index_select(0, packed.order)
    return rows.unsqueeze(0), None


def _gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """[1, H, N, d] → [H, B, T, d] of one group: heads stay in front, where the model put them, without a copy."""
    count, length = group.shape
    if group.contiguous_start is not None:
        rows = tensor[0, :, group.contiguous_start : group.contiguous_start + count * length]
    else:
        rows = tensor[0].index_select(1, group.gather_BT.reshape(-1))
    return rows.unflatten(1, (count, length))


def _causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    length = q.shape[2]
    window = length if sliding_window is None else sliding_window
    windowed = length > window
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is not None or (q.device.type == "cpu" and length <= SHORT_ON_CPU)
    if plain:
        return _matrix_products(q, k, v, scale, dropout, window, softcap)
    if not windowed:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    visible = ~_hidden(length, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scale)


def _matrix_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    dropout: float,
    window: int,
    softcap: float | None,
) -> torch.Tensor:
    """softmax(q kᵀ · scaling) v, the hidden places' −∞ added by the product itself; softmax sums in float32."""
    length = q.shape[2]
    queries, keys, values = (tensor.reshape(-1, length, tensor.shape[-1]) for tensor in (q, k, v))  # [H·B, T, d]
    hidden = _hidden(length, window, q.device)
    bias = torch.zeros(length, length, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    if softcap is None:
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling)
    else:
        bare = torch.bmm(queries, keys.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
        scores = softcap * torch.tanh(bare * (scaling / softcap)) + bias  # Gemma 2 (arXiv:2408.00118, section 2)
    weights = F.softmax(scores, dim=-1).to(q.dtype)
    out = torch.bmm(F.dropout(weights, dropout) if dropout else weights, values)
    return out.view(*q.shape[:3], -1)


def _hidden(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which of [query, key] may not be seen: later keys, and those `window` or more tokens back."""
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None, :]
    return (distance < 0) | (distance >= window)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says who sees whom; transformers builds no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)  # type: ignore[arg-type]

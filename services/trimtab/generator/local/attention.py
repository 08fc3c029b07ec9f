"""Attention of a decode step on a CPU, registered with transformers as "trimtab_decode".

One query a row against its cached keys is two small batched products; as such they run faster on a CPU than torch's
fused kernel, which is made for long queries. Everything else (prefill, other devices, anything with a position bias,
sinks or a soft cap) goes to transformers' own sdpa attention.
"""

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "trimtab_decode"
SPECIAL = ("softcap", "position_bias", "s_aux")


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, d], key and value [B, H_kv, L, d], mask [B, 1, T, L] bool or None → [B, T, H, d]."""
    plain = attention_mask is None or (attention_mask.dtype is torch.bool and attention_mask.shape[1] == 1)
    special = any(options.get(name) is not None for name in SPECIAL)
    if query.shape[2] != 1 or query.device.type != "cpu" or special or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    batch, heads, _, width = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], width)
    if key.dtype is torch.bfloat16:
        key = key.contiguous()  # oneDNN would copy it transposed, which takes thrice as long
    scores = torch.matmul(grouped * (scaling if scaling is not None else width**-0.5), key.transpose(2, 3))
    if attention_mask is not None:
        scores.masked_fill_(attention_mask.logical_not(), -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).view(batch, 1, heads, value.shape[3]), None


AttentionInterface.register(NAME, decode_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

"""The layers of the Llama family on a CPU, by few large operations instead of transformers' many small ones.

Llama, Mistral, Qwen2 and Qwen3 are one formula: RMSNorm, rotary grouped attention, SwiGLU. Here it stands once, over
weights packed for the CPU (llama_weights.py). How tokens attend is the caller's: the generator's runner attends to its
cache, packed_llama.py to a packed row. Inference only. Suffixes: N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from trimtab.models.llama_weights import Layer, lies_in_pairs


@dataclass(frozen=True)
class HeadShape:
    """Heads of queries, heads of keys and values, and what each holds."""

    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype


class LlamaFormula:
    """What a layer does before and behind its attention, for a model that `llama_weights.is_llama` knows."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.shape = HeadShape(heads, config.num_key_value_heads, head_dim, model.dtype)
        body: Any = model.base_model
        self._epsilon = torch.tensor([config.rms_norm_eps], dtype=torch.float32)
        self._activation: Callable[[torch.Tensor], torch.Tensor] = body.layers[0].mlp.act_fn
        self._rotary_embedding = body.rotary_emb
        self._rotary = torch.empty(0)

    def before(self, layer: Layer, hidden_ND: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side, [N, heads and twice key heads, head_dim]."""
        heads, turned = self.shape.heads, self.shape.heads + self.shape.key_heads
        qkv = layer.qkv(self.norm(hidden_ND, layer.input_norm)).view(len(hidden_ND), -1, self.shape.head_dim)
        if layer.query_norm is not None and layer.key_norm is not None:
            qkv[:, :heads] = self.norm(qkv[:, :heads], layer.query_norm)
            qkv[:, heads:turned] = self.norm(qkv[:, heads:turned], layer.key_norm)
        qk = qkv[:, :turned]
        if turns.is_complex():
            torch.view_as_complex(qk.view(len(qk), turned, -1, 2)).mul_(turns)
        else:
            cos, sin = turns.split(1, dim=1)
            qkv[:, :turned] = (qk * cos).addcmul_(qk.roll(self.shape.head_dim // 2, -1), sin)
        return qkv

    def after(self, layer: Layer, attended_ND: torch.Tensor, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The layer's output [N, D], from what its heads attended to and its input."""
        hidden_ND = layer.output(attended_ND).add_(hidden_ND)
        gate, up = layer.gate_up(self.norm(hidden_ND, layer.mlp_norm)).chunk(2, dim=1)
        return layer.down(self._activation(gate).mul_(up)).add_(hidden_ND)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension, statistics in float32: norms.py's formula by fewer operations."""
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = torch.addcmul(self._epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (wide * inverse).to(x.dtype).mul_(weight)

    def turns(self, positions_N: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """What turns queries and keys to their rotary positions (RoFormer, arXiv:2104.09864).

        In float32, whose weights lay the two halves of a head in pairs, e^iθ as complex numbers [N, 1, head_dim / 2];
        else cos and sin [N, 2, head_dim] in the dtype of `like`, the sine's first half negative.
        """
        needed = int(positions_N.max()) + 1
        if self._rotary.shape[0] < needed:
            positions = torch.arange(max(256, 2 ** (needed - 1).bit_length()))[None]
            cos, sin = (table[0] for table in self._rotary_embedding(like[:1], positions))
            half = sin.shape[-1] // 2
            if lies_in_pairs(like.dtype):
                self._rotary = torch.complex(cos[:, None, :half], sin[:, None, :half])
            else:
                self._rotary = torch.stack((cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)), dim=1)
        return self._rotary[torch.from_numpy(positions_N.astype(np.int64))]

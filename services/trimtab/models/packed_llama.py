"""A Llama-family body over a packed row on a CPU, for models that are only asked: the last tokens' hidden states.

The layers are llama.py's over weights packed once. The last layer asks, attends and goes on for the last tokens alone.
`Scorer` uses it where it gives the model's own numbers; the trainer, whose weights change, runs transformers' modules.
Suffixes: B sequences, T tokens of one, N tokens of the row, H heads, d size of a head.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.models.attention import packed_attention
from trimtab.models.cpu import fuses_attention
from trimtab.models.llama import LlamaFormula
from trimtab.models.llama_weights import Packer, is_llama
from trimtab.models.packing import PackedBatch, pack
from trimtab.models.policy import body_forward

TOLERANCE = {torch.bfloat16: 0.1}
"""Of the difference's norm to the hidden states'; 1e-4 in float32. Two orders of rounding, and no other formula."""
CHECKED_LENGTHS = (1, 7, 24, 13)


class PackedLlama:
    """Weights packed for one model, whose parameters it leaves as they are. Made by `of`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._formula = LlamaFormula(model)
        packer = Packer(model.state_dict().get, model.config.num_hidden_layers, self._formula.shape.head_dim, head=None)
        for _ in packer.pieces():
            pass
        self._model = model
        self._weights = packer.weights()

    @classmethod
    def of(cls, model: PreTrainedModel) -> PackedLlama | None:
        """The model's body packed, None for other families. ValueError where it gives other numbers than the model."""
        if not is_llama(model):
            return None
        body = cls(model)
        body.check()
        return body

    @torch.inference_mode()
    def check(self) -> None:
        """ValueError unless the hidden states are those of the model's own forward."""
        vocab_size = self._weights.embedding_VD.shape[0]
        packed = pack([(np.arange(1, 1 + length) * 7919 % vocab_size).astype(np.int32) for length in CHECKED_LENGTHS])
        expected_BD = body_forward(self._model, packed, packed.last_tokens_B).float()
        difference_B = (self.last_hidden(packed).float() - expected_BD).norm(dim=1)
        limit_B = TOLERANCE.get(self._model.dtype, 1e-4) * expected_BD.norm(dim=1)
        # A model whose weights are not finite is not this check's to refuse.
        if not bool((difference_B <= limit_B).logical_or(~expected_BD.isfinite().all(1)).all()):
            raise ValueError(f"hidden states differ by {float(difference_B.max()):.3g} from the model's own")

    @torch.inference_mode()
    def last_hidden(self, packed: PackedBatch) -> torch.Tensor:
        """Hidden state of each sequence's last token, [B, D]."""
        formula, weights = self._formula, self._weights
        *firsts, last = weights.layers
        count = len(packed.token_ids_N)
        # Rows behind the last token are computed in vain: no token attends to them.
        behind = (0, last.qkv.rows_for(count) - count)
        turns_N = formula.turns(np.pad(packed.position_ids_N.numpy(), behind), weights.embedding_VD)
        hidden_ND = functional.embedding(functional.pad(packed.token_ids_N, behind), weights.embedding_VD)
        for layer in firsts:
            qkv = formula.before(layer, hidden_ND, turns_N)
            hidden_ND = formula.after(layer, self._attended(qkv, packed), hidden_ND)
        qkv = formula.before(last, hidden_ND, turns_N)[:count]
        attended_BD = self._last_tokens(qkv, packed)
        hidden_BD = formula.after(last, attended_BD, hidden_ND.index_select(0, packed.last_tokens_B))
        return formula.norm(hidden_BD, weights.norm)

    def _attended(self, qkv: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """What every token attends to, [N, H · d], of a layer's [N, heads, d]; zeros behind the packed tokens."""
        shape = self._formula.shape
        q, k, v = (part.transpose(0, 1)[None] for part in qkv.split((shape.heads, *[shape.key_heads] * 2), dim=1))
        if not fuses_attention(shape.dtype, gradients=False):
            attended, _ = packed_attention(self._model, q, k, v, None, packed=packed)
            return attended[0].flatten(1)
        repeats, count = shape.heads // shape.key_heads, len(packed.token_ids_N)
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        qs, ks, vs = (part[:, :, :count].split(packed.lengths, dim=2) for part in (q, k, v))
        attend = partial(functional.scaled_dot_product_attention, is_causal=True)
        outs = [attend(*one) for one in zip(qs, ks, vs, strict=True)]
        attended_ND = torch.cat([out[0].transpose(0, 1).flatten(1) for out in outs])
        return functional.pad(attended_ND, (0, 0, 0, len(qkv) - count))

    def _last_tokens(self, qkv: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """What each sequence's last token attends to, [B, H · d], of the last layer's [N, heads, d]."""
        shape = self._formula.shape
        q = qkv.index_select(0, packed.last_tokens_B)[:, : shape.heads]
        attended = []
        for asked, kv in zip(q, qkv[:, shape.heads :].transpose(0, 1).split(packed.lengths, dim=1), strict=True):
            k, v = kv[None].split(shape.key_heads, dim=1)  # [1, key heads, T, d]
            asked = asked.view(1, shape.key_heads, -1, shape.head_dim)  # a key head's queries, as tokens of one head
            attended.append(functional.scaled_dot_product_attention(asked, k, v).view(1, -1))
        return torch.cat(attended)

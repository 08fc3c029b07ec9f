"""Which layouts of tokens in one row a model reads as it reads each sequence alone: tried on the model itself.

Attention that goes through `attention` and positions that come as position ids allow both layouts. A model that carries
a state from token to token (Mamba, linear attention, convolutions) or counts its positions in the row (ALiBi) allows
neither; no list of architectures would stay complete.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from trimtab.models.errors import ModelLoadError
from trimtab.models.packing import PackedBatch, pack, pack_sets

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.03}
"""Of the difference's norm to the hidden states'; 1e-4 in float32. What leaks in changes them as a word does."""

Body = Callable[[PreTrainedModel, PackedBatch], torch.Tensor]


def check_packing(model: PreTrainedModel, body: Body, source: str) -> None:
    """ModelLoadError unless sequences in one row leave each other alone; `body` gives the hidden states [N, D]."""
    sequences = _sequences(model)
    try:
        fits = _as_alone(model, body, pack(sequences, model.device), sequences)
    except Exception as error:
        reason = f"{source}: {type(model).__name__} has no packed forward ({type(error).__name__}: {error})"
        raise ModelLoadError("model", reason) from error
    if not fits:
        raise ModelLoadError(
            "model",
            f"{source}: {type(model).__name__} mixes sequences that stand in one row (a recurrent state, or positions "
            "that it counts itself); take a model with attention over position ids",
        )


def shares_beginnings(model: PreTrainedModel, body: Body) -> bool:
    """Whether `packing.pack_sets` gives this model's own hidden states."""
    sequences = _sequences(model)
    return _as_alone(model, body, pack_sets([sequences[:2], sequences[2:]], model.device), sequences)


def _sequences(model: PreTrainedModel) -> list[np.ndarray]:
    """Two that begin alike and two others, of ids that the model knows."""
    vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type]
    ids = (np.arange(1, 25) * 7919 % vocab_size).astype(np.int32)
    return [ids[:7], np.concatenate([ids[:4], ids[8:13]]), ids[13:16], ids[16:]]


@torch.no_grad()
def _as_alone(model: PreTrainedModel, body: Body, packed: PackedBatch, sequences: list[np.ndarray]) -> bool:
    alone_BD = torch.stack([body(model, pack([sequence], model.device))[-1] for sequence in sequences]).float()
    together_BD = body(model, packed)[packed.last_tokens_B].float()
    allowed = TOLERANCE.get(model.dtype, 1e-4) * alone_BD.norm(dim=1)
    # A model whose weights are not finite is not this check's to refuse.
    return bool(((together_BD - alone_BD).norm(dim=1) <= allowed).logical_or(~alone_BD.isfinite().all(1)).all())

"""Token ids to scores: the forward of a reward model in this process. `forward_runner` asks one in another.

It knows no queue, no version and no text. Suffix: B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from trimtab.models.folders import DTYPES
from trimtab.models.packed_llama import PackedLlama
from trimtab.models.packing import pack, plan_batches
from trimtab.models.scalar_head import ScalarModel
from trimtab.runtime.logs import get_logger

CPU_TOKENS, CPU_HIDDEN = 1024, 2**18
"""Tokens of one forward on a CPU, or more of them up to so many numbers of hidden states: what its layers pass on then
stays in the core's cache."""

log = get_logger(__name__)


class Forward(Protocol):
    """Where a model computes."""

    def score(self, sequences: Sequence[np.ndarray], *, alone: bool) -> np.ndarray:
        """Raw scores float32 [B], read at each sequence's last token, finite or not. Device thread only.

        With `alone` each sequence has a forward of its own.
        """
        ...

    async def close(self) -> None:
        """Let go of what it holds outside this process."""
        ...


class ModelForward:
    """The forward of a `ScalarModel`, whose weights must not change any more."""

    def __init__(self, model: ScalarModel) -> None:
        self.model = model
        self._llama = _packed_body(model)
        self._most_tokens = max(CPU_TOKENS, CPU_HIDDEN // model.model.config.get_text_config().hidden_size)

    def score(self, sequences: Sequence[np.ndarray], *, alone: bool) -> np.ndarray:
        """See `Forward`."""
        most = self._most_tokens if self.model.device.type == "cpu" else sum(map(len, sequences))
        plan = [[i] for i in range(len(sequences))] if alone else plan_batches([len(ids) for ids in sequences], most)
        scores_B = np.empty(len(sequences), dtype=np.float32)
        with torch.inference_mode():
            for members in plan:
                scores_B[members] = self._forward([sequences[i] for i in members]).float().cpu().numpy()
        return scores_B

    async def close(self) -> None:
        """Nothing is held outside."""

    def _forward(self, sequences: Sequence[np.ndarray]) -> torch.Tensor:
        packed = pack(sequences, self.model.device)
        if self._llama is None:
            return self.model.last_token_scores(packed)
        return self.model.head_scores(self._llama.last_hidden(packed))


def _packed_body(model: ScalarModel) -> PackedLlama | None:
    """The fast forward of the Llama family; None where transformers' own is the right one."""
    try:
        return PackedLlama.of(model.model)
    except ValueError as error:
        log.warning("scored by transformers' forward, which is slower", reason=str(error))
        return None


def read_beside_running(folder: str, *, dtype: str, device: str) -> ScalarModel:
    """`ScalarModel.load` that is safe while another model computes.

    Read as float32 and cast parameter by parameter: reading in another dtype changes torch's default dtype for
    every thread meanwhile, and casting the whole module would round the float32 tables of its rotary positions.
    """
    model = ScalarModel.load(folder, dtype="float32", device="cpu")
    for parameter in model.model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    module: Any = model.model
    module.to(device)
    return model

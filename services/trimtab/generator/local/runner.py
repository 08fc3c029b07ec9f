"""Run any Hugging Face causal LM over the slot cache: prefill of new rows, one decode step of all live rows.

Returns the logits of each row's newest token; sampling is sampler.py's matter, rows are slots.py's. The Llama family
has a faster runner on a CPU, llama.py; runners.py chooses.
"""

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from trimtab.generator.local.kv_cache import SlotCache
from trimtab.generator.local.live_weights import LiveWeights


class ModelRunner(LiveWeights):
    """Owns the live model and its cache. Every method runs on the one thread that does model work.

    Raises ValueError for an architecture whose past is not keys and values of each token (recurrent, encoder-decoder).
    """

    def __init__(self, model: PreTrainedModel, *, max_rows: int) -> None:
        if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} is not served by the local engine: it keeps a recurrent or encoder state, "
                "not one key and value a token; choose a decoder-only attention model"
            )
        super().__init__(model)
        self.max_rows = max_rows
        self.takes_pieces = False
        self.cache = SlotCache(max_rows)
        accepted = inspect.signature(model.forward).parameters
        self._keeps_last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted

    def reset(self) -> None:
        """Begin with an empty cache, whatever state a failed forward left."""
        self.cache = SlotCache(self.max_rows)

    def keep(self, survivors: Sequence[int], longest: int) -> None:
        """Keep rows `survivors`, in that order, as rows 0, 1, ...; the longest of them has `longest` tokens."""
        self.cache.compact(survivors)
        self.cache.trim(longest)

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what rows hold, numbers that are not finite too."""
        self.cache.clear_rows(rows)

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[np.ndarray], *, first_row: int, copies: Sequence[int] = ()) -> torch.Tensor:
        """Compute `sequences` (int32 ids) into the rows from `first_row` on; float32 logits [rows written, V].

        `copies[i]` rows are written for sequence i (one each by default).
        """
        lengths = np.array([len(sequence) for sequence in sequences])
        width = int(lengths.max())
        tokens_BL = np.zeros((len(sequences), width), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            tokens_BL[row, width - len(sequence) :] = sequence
        columns_L = np.arange(width)
        pads_B1 = (width - lengths)[:, None]
        source, count = None, len(sequences)
        if any(copy != 1 for copy in copies):
            source = torch.from_numpy(np.repeat(np.arange(len(sequences)), copies)).to(self.device)
            count = int(source.shape[0])
        self.cache.begin_prefill(first_row, width, source, count)
        try:
            logits = self._forward(tokens_BL, columns_L >= pads_B1, np.maximum(columns_L - pads_B1, 0))
        finally:
            self.cache.end_prefill()
        return logits if source is None else logits.index_select(0, source)

    def extend(self, token_ids: np.ndarray, *, row: int, start: int, copies: int = 1) -> torch.Tensor:
        """Not here: a row's columns move with the others', so its prompt is computed at once."""
        raise NotImplementedError("the cache of this runner takes whole prompts")

    @torch.inference_mode()
    def decode(
        self,
        tokens_B: np.ndarray,
        lengths_B: np.ndarray,
        prompts: Sequence[np.ndarray] = (),
        copies: Sequence[int] = (),
    ) -> torch.Tensor:
        """Feed one token a live row, whose past is `lengths_B` tokens long, then `prompts` to the rows behind.

        Float32 logits [B and the rows written as by `prefill`, V].
        """
        self.cache.begin_decode()
        width = self.cache.window.length + 1
        mask_BL = np.arange(width) >= (width - 1 - lengths_B)[:, None]
        logits = self._forward(tokens_B.astype(np.int64)[:, None], mask_BL, lengths_B.astype(np.int64)[:, None])
        self.cache.end_decode(int(lengths_B.max()) + 1)
        return torch.cat((logits, self.prefill(prompts, first_row=len(logits), copies=copies))) if prompts else logits

    def _forward(self, tokens_BL: np.ndarray, mask_BL: np.ndarray, positions_BL: np.ndarray) -> torch.Tensor:
        positions = {"position_ids": torch.from_numpy(positions_BL).to(self.device)} if self._takes_positions else {}
        output = self.model(
            input_ids=torch.from_numpy(tokens_BL).to(self.device),
            attention_mask=torch.from_numpy(mask_BL.astype(np.int64)).to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            **positions,
            **self._keeps_last,
        )
        return output.logits[:, -1].float()

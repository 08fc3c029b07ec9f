"""A reward model ready to score: texts to ids, ids to scores.

It holds no queue and no version; `service` batches sequences of many calls into `score`. Suffix: B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from trimtab.models.errors import ModelLoadError
from trimtab.models.folders import DTYPES
from trimtab.models.packed_llama import PackedLlama
from trimtab.models.packing import pack, plan_batches
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.tokenizers import encode, encode_chat, encode_continuation
from trimtab.runtime.logs import get_logger

TextEncoding = Literal["auto", "trained", "plain"]
CPU_TOKENS, CPU_HIDDEN = 1024, 2**18
"""Tokens of one forward on a CPU, or more of them up to so many numbers of hidden states: what its layers pass on then
stays in the core's cache."""

log = get_logger(__name__)


class Scorer:
    """A `ScalarModel` with the encoding its scores were made for; its weights must not change any more.

    `deterministic` is what calls get that do not ask for it: a forward for each sequence, so that not one bit depends
    on the company.

    Raises ModelLoadError where the normalisation constants cannot normalise.
    """

    def __init__(
        self,
        model: ScalarModel,
        *,
        max_length: int | None = None,
        text_encoding: TextEncoding = "auto",
        deterministic: bool = False,
    ) -> None:
        if not (math.isfinite(model.mean) and math.isfinite(model.std) and model.std > 0):
            raise ModelLoadError(
                "config",
                f"{model.source}: trimtab_score_mean {model.mean} and trimtab_score_std {model.std} are no scale",
            )
        self.model = model
        self.max_length = model.max_length if max_length is None else min(max_length, model.max_length)
        self.deterministic = deterministic
        ours = getattr(model.model.config, "trimtab_score_mean", None) is not None
        self._llama = _packed_body(model)
        self._most_tokens = max(CPU_TOKENS, CPU_HIDDEN // model.model.config.get_text_config().hidden_size)
        self.encodes_as_trained = text_encoding == "trained" or (text_encoding == "auto" and ours)

    @property
    def end_token_ids(self) -> np.ndarray:
        """What stands behind a response in training: the model's end token, if it has one and was trained so."""
        ends = self.model.eos_token_ids[:1] if self.encodes_as_trained else ()
        return np.asarray(ends, dtype=np.int32)

    def encode_pair(self, prompt: str, response: str) -> np.ndarray:
        """int32 ids of prompt + response: the prompt's own ids first, the response as its continuation."""
        token_ids, _ = encode_continuation(self.model.tokenizer, prompt, response)
        return np.concatenate([token_ids, self.end_token_ids])

    def encode_conversation(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """int32 ids of a conversation through the model's own chat template.

        Encoded as trained, a reply at the end goes behind the template's generation prompt, as rankings do.
        ValueError where there is no template or it refuses the messages.
        """
        tokenizer = self.model.tokenizer
        if self.encodes_as_trained and len(messages) > 1 and messages[-1]["role"] == "assistant":
            head = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
            reply = encode(tokenizer, messages[-1]["content"], special=False)
            return np.concatenate([head, reply, self.end_token_ids])
        return encode_chat(tokenizer, messages, add_generation_prompt=False)

    def score(self, sequences: Sequence[np.ndarray], *, alone: bool = False) -> np.ndarray:
        """Raw scores float32 [B], read at each sequence's last token, finite or not. Device thread only.

        With `alone` each sequence has a forward of its own.
        """
        most = self._most_tokens if self.model.device.type == "cpu" else sum(map(len, sequences))
        plan = [[i] for i in range(len(sequences))] if alone else plan_batches([len(ids) for ids in sequences], most)
        scores_B = np.empty(len(sequences), dtype=np.float32)
        with torch.inference_mode():
            for members in plan:
                scores_B[members] = self._forward([sequences[i] for i in members]).float().cpu().numpy()
        return scores_B

    def _forward(self, sequences: Sequence[np.ndarray]) -> torch.Tensor:
        packed = pack(sequences, self.model.device)
        if self._llama is None:
            return self.model.last_token_scores(packed)
        return self.model.head_scores(self._llama.last_hidden(packed))

    def normalized(self, scores_B: np.ndarray) -> np.ndarray:
        """(score − mean) / deviation with the version's constants, float32 [B]."""
        return ((scores_B.astype(np.float64) - self.model.mean) / self.model.std).astype(np.float32)

    def check(self) -> None:
        """Score one short sequence; ModelLoadError where that is no number. Device thread only."""
        token_ids = np.asarray(self.model.eos_token_ids[:1] or (0,), dtype=np.int32)
        score = float(self.score([token_ids])[0])
        if not math.isfinite(score):
            raise ModelLoadError("weights", f"{self.model.source} scores {score}: its weights are not finite")


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

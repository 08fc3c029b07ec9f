"""A reward model ready to score: texts to ids here, ids to scores by its `forward`.

It holds no queue and no version; `model_scorer` batches the sequences of many calls. Suffix: B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from trimtab.models.errors import ModelLoadError
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.tokenizers import encode, encode_chat, encode_continuation
from trimtab.reward.forward import Forward
from trimtab.reward.forward_messages import ModelFacts

TextEncoding = Literal["auto", "trained", "plain"]


class Scorer:
    """A model with the encoding its scores were made for, and where it computes.

    `deterministic` is what calls get that do not ask for it: a forward for each sequence, so that not one bit depends
    on the company.

    Raises ModelLoadError where the normalisation constants cannot normalise.
    """

    def __init__(
        self,
        model: ScalarModel | ModelFacts,
        forward: Forward,
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
        self.forward = forward
        self.max_length = model.max_length if max_length is None else min(max_length, model.max_length)
        self.deterministic = deterministic
        self.encodes_as_trained = text_encoding == "trained" or (text_encoding == "auto" and model.is_normalized)

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

    def normalized(self, scores_B: np.ndarray) -> np.ndarray:
        """(score − mean) / deviation with the version's constants, float32 [B]."""
        return ((scores_B.astype(np.float64) - self.model.mean) / self.model.std).astype(np.float32)

    def check(self) -> None:
        """Score one short sequence; ModelLoadError where that is no number. Device thread only."""
        token_ids = np.asarray(self.model.eos_token_ids[:1] or (0,), dtype=np.int32)
        score = float(self.forward.score([token_ids], alone=True)[0])
        if not math.isfinite(score):
            raise ModelLoadError("weights", f"{self.model.source} scores {score}: its weights are not finite")

"""Does vLLM compute what a version's weights say? Its log-probs of a fixed prompt against an independent forward.

vLLM can load weights and say nothing of a part that it left as it was: tied embeddings once were. The forward is
transformers', in host memory, on the tensors that were staged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.func import functional_call

from trimtab.models.policy import Policy

PROBE_LENGTH = 24
# Largest difference in float32, mean difference in half precision, as for the local engine's self-check.
FLOAT32_LIMIT = 2e-3
HALF_LIMIT = 0.2
# Below these the difference is the arithmetic's, whatever it was when the engine started.
FLOAT32_NOISE = 1e-5
HALF_NOISE = 2e-2


@dataclass(frozen=True)
class Expected:
    """What full forwards say of the probe: float32 log-probs of its next tokens [T-1] and of all at its end [V]."""

    logprobs_T: np.ndarray
    lse_T: np.ndarray
    last_V: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What vLLM says: logits of the probe's next tokens [T-1], the token it sampled then, and its log-prob."""

    logits_T: np.ndarray
    token_id: int
    logprob: float

    @classmethod
    def of(cls, token_ids: Sequence[int], prompt_logprobs: Any, completion: Any) -> "Measured":
        """Out of vLLM's output for the probe `token_ids` [T], whose first token has no logit."""
        entries = [prompt_logprobs[position][token] for position, token in enumerate(token_ids) if position]
        logits_T = np.array([entry.logprob for entry in entries], np.float32)
        return cls(logits_T, int(completion.token_ids[0]), float(completion.logprobs.logprobs[0]))


class Probe:
    """The prompt, the limits, and the last version that was found right."""

    def __init__(self, policy: Policy, max_length: int) -> None:
        length = min(PROBE_LENGTH, max_length - 1)
        self.token_ids: list[int] = np.random.default_rng(0).integers(0, policy.vocab_size, length).tolist()
        self._model = policy.model
        exact = policy.model.dtype is torch.float32
        self._limit, self._noise = (FLOAT32_LIMIT, FLOAT32_NOISE) if exact else (HALF_LIMIT, HALF_NOISE)
        self._exact = exact
        self._served: Expected | None = None

    @torch.inference_mode()
    def expected(self, tensors: Mapping[str, Any] | None = None) -> Expected:
        """Of the policy as it is, or with `tensors` (its state dict's names) in the place of its own."""
        ids = torch.tensor([self.token_ids])
        arguments = {"input_ids": ids, "use_cache": False}
        named = self._model.state_dict() if tensors is None else tensors
        # Tied names come with a tensor each.
        output = functional_call(self._model, dict(named), (), arguments, tie_weights=False)
        logits_TV = output.logits[0].float()
        lse_T = torch.logsumexp(logits_TV, -1)
        own_T = logits_TV[:-1].gather(1, ids[0, 1:, None])[:, 0] - lse_T[:-1]
        return Expected(own_T.numpy(), lse_T[:-1].numpy(), (logits_TV[-1] - lse_T[-1]).numpy())

    def check(self, expected: Expected, measured: Measured) -> float:
        """The mean difference of log-probs, nats; remembers what was right. Raises ValueError where it is too large.

        Too large is above the limit of the precision, and, beside what the engine's arithmetic differs by anyway, more
        than a part of what the new version differs from the one before: weights that were left as they were show, even
        where a training step is small.
        """
        errors = np.abs(
            np.append(
                measured.logits_T - expected.lse_T - expected.logprobs_T,
                measured.logprob - expected.last_V[measured.token_id],
            )
        )
        mean, worst = float(errors.mean()), float(errors.max() if self._exact else errors.mean())
        moved = 0.0 if self._served is None else float(np.abs(expected.logprobs_T - self._served.logprobs_T).mean())
        if not (worst <= self._limit and (self._served is None or mean <= 4 * self._noise + 0.1 * moved)):
            raise ValueError(
                f"vLLM's log-probs of it differ from a full forward by {mean:.2g} nats in the mean, {errors.max():.2g} "
                f"at most, where the version moves them by {moved:.2g}: the weights were not loaded as they are"
            )
        if self._served is None:
            self._noise = max(self._noise, mean)
        self._served = expected
        return mean

"""PPO-ptx: beside each PPO minibatch the policy learns a batch of pretraining text (InstructGPT, eq. 2 and app. C.4).

The loss is coefficient · mean NLL a token, its gradients added to the minibatch's own before the optimizer's step. It
keeps the policy from forgetting what the reward model does not look at.
"""

from __future__ import annotations

from typing import Any

from trimtab.models.packing import plan_batches
from trimtab.models.policy import Policy
from trimtab.trainer.forward import TokenBatch, response_logprobs, slice_batch
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.ppo.prompts import Sampler


class Pretraining:
    """Pretraining texts with their own sampler; `texts` are sequences whose first token is a prompt."""

    def __init__(
        self, texts: TokenBatch, *, coefficient: float, batch_size: int, micro_batch_tokens: int, seed: int
    ) -> None:
        self._texts = texts
        self._coefficient = coefficient
        self._batch_size = batch_size
        self._micro_batch_tokens = micro_batch_tokens
        self._sampler = Sampler(range(len(texts)), [seed, 2])

    def accumulate(self, policy: Policy, optimizer: MasterWeightOptimizer) -> float:
        """Add the gradients of the next texts to the optimizer; returns this rank's part of their mean NLL a token."""
        indices = self._sampler.draw(self._batch_size)
        tokens = int(sum(self._texts.response_lengths[i] for i in indices))
        total = 0.0
        lengths = [self._texts.lengths[i] for i in indices]
        for micro in optimizer.ranks.plan(lengths, self._micro_batch_tokens, plan_batches):
            part = slice_batch(self._texts, [indices[i] for i in micro], policy.device)
            nll = -response_logprobs(policy, part).logprob_N.sum() / tokens
            (self._coefficient * nll).backward()
            optimizer.accumulate()
            total += float(nll.detach())
        return total

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._sampler.load_state_dict(state)

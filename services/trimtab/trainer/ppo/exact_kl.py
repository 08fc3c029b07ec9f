"""Exact KL(policy‖reference) of a PPO step, from the reference's hidden states and the LM head that the trainer holds.

The reference sends the bfloat16 hidden state behind each response token, which is all that a head needs to give its
whole distribution; the two-head kernel sums over the vocabulary chunk by chunk, so that no [R, V] is formed. It is the
KL at the states that the policy sampled, free of the sampled token's noise; what bfloat16 rounds away adds a little.
Suffixes: R response tokens of a batch (or of one micro-batch), D the reference's hidden size.
"""

from __future__ import annotations

import torch

from trimtab.kernels.api import ExactKl
from trimtab.models.errors import ModelLoadError
from trimtab.models.policy import LMHead, Policy
from trimtab.trainer.forward import Slice, hidden_exact_kl, scaled_like
from trimtab.trainer.ppo.experience import Experience
from trimtab.trainer.run import RunFailedError
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import resolve_source
from trimtab.weights.store import Store
from trimtab_client import ModelInfo

LARGEST_GAP_NATS = 0.5
"""Mean difference, times temperature, between the log-probs of the held head and the reference's own; bfloat16 hidden
states make about 0.01."""


class ReferenceHeadError(RunFailedError):
    """The trainer has no LM head that gives the reference's distribution; the message says why and what to do."""


class StepKl:
    """The exact KL of one step's response tokens.

    Attributes:
        kl_R: KL of the policy that `measure` saw, nats.
        gap_R: log-prob of each response token by the held head and the bfloat16 hidden state, less the reference's own.
    """

    def __init__(self, head: LMHead, experience: Experience, temperature: float) -> None:
        if experience.reference_hidden_RD is None:
            raise ReferenceHeadError("kl: exact KL needs the reference's hidden states, and none came")
        self.kl_R = torch.zeros(len(experience.reference_R))
        self.gap_R = torch.zeros_like(self.kl_R)
        self._head = head
        self._hidden_RD = experience.reference_hidden_RD
        self._reference_R = experience.reference_R
        self._temperature = temperature
        if self._hidden_RD.shape[1] != head.weight_VD.shape[1]:
            raise ReferenceHeadError(
                f"kl: the reference sends hidden states of size {self._hidden_RD.shape[1]}, but its LM head, as the "
                f"trainer found it, takes {head.weight_VD.shape[1]}; serve the reference from a published version"
            )

    @torch.no_grad()
    def measure(self, policy: Policy, hidden_RD: torch.Tensor, part: Slice) -> None:
        """Note KL and gap at the response tokens of `part`, whose `response_hidden` is given."""
        where = part.flat_R.cpu()
        exact = self._compute(policy, hidden_RD, part)
        self.kl_R[where] = exact.kl_N.float().cpu()
        self.gap_R[where] = exact.reference_logprob_N.float().cpu() - self._reference_R[where]

    def total(self, policy: Policy, hidden_RD: torch.Tensor, part: Slice) -> torch.Tensor:
        """Σ KL over the response tokens of `part`, nats, with gradient."""
        return self._compute(policy, hidden_RD, part).kl_N.sum()

    def check(self) -> None:
        """Refuse a head that is not the reference's, once all was measured; raises ReferenceHeadError."""
        gap_nats = float(self.gap_R.abs().mean()) * self._temperature
        if gap_nats > LARGEST_GAP_NATS:
            raise ReferenceHeadError(
                f"kl: the LM head that the trainer holds gives other log-probs than the reference (by {gap_nats:.2f} "
                "nats a token); it is not the reference's: serve the reference from a published version"
            )

    def metrics(self, episodes: int) -> dict[str, float]:
        """Nats a sequence, and the mean gap in nats a token."""
        return {
            "kl_exact_nats_per_sequence": float(self.kl_R.sum()) / episodes,
            "reference_hidden_gap_mean": float(self.gap_R.abs().mean()),
        }

    def _compute(self, policy: Policy, hidden_RD: torch.Tensor, part: Slice) -> ExactKl:
        (reference_hidden_RD,) = part.take(self._hidden_RD)
        return hidden_exact_kl(policy, hidden_RD, part, self._head, reference_hidden_RD, self._temperature)


def load_reference_head(reference: ModelInfo, policy: Policy, store: Store) -> LMHead:
    """The LM head of the model that the reference says it serves, on the policy's device and in its logit scale.

    The model is loaded in host memory in the dtype it is served in; only its head is kept.

    Raises:
        ReferenceHeadError: no such version, folder or id here; another model under its name; another vocabulary.
    """
    version = reference.version
    if reference.vocab_size != policy.vocab_size:
        raise ReferenceHeadError(
            f"kl: exact KL needs one vocabulary, but the reference ({version}) has {reference.vocab_size} tokens and "
            f"the policy {policy.vocab_size}; use kl: sampled, or a reference that the policy descends from"
        )
    source = f"version:{version}" if version.run_id else version.name
    try:
        found = resolve_source(source, store)
        model = Policy.load(found.path_or_id, dtype=reference.dtype)
    except (StoreError, ModelLoadError) as error:
        raise ReferenceHeadError(
            f"kl: the reference serves {version}, whose LM head cannot be had from here ({error}); "
            "publish that model to the trainer's store and serve the reference from there, or use kl: sampled"
        ) from error
    if version.digest and found.version.digest != version.digest:
        raise ReferenceHeadError(
            f"kl: the reference serves {version} with digest {version.digest}, but the trainer's store has "
            f"{found.version.digest}; give both the same store"
        )
    mine = (model.architecture, model.parameter_count, model.tokenizer_digest, model.head.weight_VD.shape[0])
    theirs = (reference.architecture, reference.parameter_count, reference.tokenizer_digest, reference.vocab_size)
    if mine != theirs:
        raise ReferenceHeadError(
            f"kl: {found.path_or_id} is not the model that the reference serves as {version} ({mine[0]} of {mine[1]} "
            f"parameters, there {theirs[0]} of {theirs[1]}); serve the reference from a published version"
        )
    return _kept(scaled_like(model.head, policy.head), policy.device)


def _kept(head: LMHead, device: torch.device) -> LMHead:
    """The head alone, fixed, on a device; float16, which cannot hold every bfloat16 hidden state, as float32."""
    dtype = torch.float32 if head.weight_VD.dtype == torch.float16 else head.weight_VD.dtype
    return LMHead(
        weight_VD=head.weight_VD.detach().to(device, dtype),
        bias=None if head.bias is None else head.bias.detach().to(device, dtype),
        softcap=head.softcap,
        scale=head.scale,
    )

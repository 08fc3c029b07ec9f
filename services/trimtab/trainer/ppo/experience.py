"""What a step learns from: completions with their reference log-probs and scores, in prompt order.

Flat arrays [R] run over the batch's response tokens, sequence after sequence, ordered by index, never by arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.trainer.forward import TokenBatch
from trimtab_client import Completion


@dataclass
class Episode:
    """One completion on its way: the reward and reference services fill in their parts.

    Attributes:
        gold_score: what `gold_scorer` says, normalised; None without one.
        reference_hidden: uint16 [R, D], the bits of the reference's bfloat16 hidden states; only for exact KL.
    """

    completion: Completion
    score: float = float("nan")
    normalized_score: float = float("nan")
    reference_logprobs: np.ndarray | None = None
    reference_hidden: np.ndarray | None = None
    gold_score: float | None = None

    @property
    def complete(self) -> bool:
        """Whether score and reference log-probs are there."""
        return self.reference_logprobs is not None and self.normalized_score == self.normalized_score

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and response, int32 [T]."""
        return np.concatenate([self.completion.prompt_token_ids, self.completion.token_ids])


@dataclass(frozen=True)
class Experience:
    """A batch of B episodes.

    Attributes:
        behaviour_R: log-probs by the engine, at the version that sampled each token.
        reference_R: log-probs by the frozen SFT policy.
        scores_B, normalized_B: reward model's raw and normalised score.
        ended_B: whether an end token closed the response.
        gold_B: normalised scores of the gold scorer, where there is one.
        reference_hidden_RD: the hidden states behind `reference_R`, bfloat16; only for exact KL.
    """

    tokens: TokenBatch
    behaviour_R: torch.Tensor
    reference_R: torch.Tensor
    scores_B: torch.Tensor
    normalized_B: torch.Tensor
    ended_B: torch.Tensor
    reference_hidden_RD: torch.Tensor | None = None
    gold_B: torch.Tensor | None = None

    @property
    def lengths_B(self) -> torch.Tensor:
        """Response tokens of each episode, int64."""
        return torch.as_tensor(self.tokens.response_lengths)


def gather_experience(episodes: Sequence[Episode]) -> Experience:
    """Put finished episodes, already in index order, into flat arrays."""
    references = [episode.reference_logprobs for episode in episodes]
    hidden = [episode.reference_hidden for episode in episodes if episode.reference_hidden is not None]
    gold = [episode.gold_score for episode in episodes if episode.gold_score is not None]
    completions = [episode.completion for episode in episodes]
    return Experience(
        tokens=TokenBatch(
            tuple(episode.token_ids for episode in episodes), tuple(len(c.prompt_token_ids) for c in completions)
        ),
        behaviour_R=torch.as_tensor(np.concatenate([c.logprobs for c in completions])),
        reference_R=torch.as_tensor(np.concatenate([r for r in references if r is not None])),
        scores_B=torch.tensor([episode.score for episode in episodes]),
        normalized_B=torch.tensor([episode.normalized_score for episode in episodes]),
        ended_B=torch.tensor([c.finish_reason == "stop" for c in completions]),
        reference_hidden_RD=_bfloat16(np.concatenate(hidden)) if hidden else None,
        gold_B=torch.tensor(gold) if gold else None,
    )


def _bfloat16(bits: np.ndarray) -> torch.Tensor:
    """The numbers of which a uint16 array holds the bits."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def episode_scores(experience: Experience, no_eos_score: float | None) -> torch.Tensor:
    """The score PPO sees [B]: normalised, replaced (not lowered) by `no_eos_score` where no end token came.

    The replacement is Ziegler 2019's (N+ implementation details, detail 7); off with None.
    """
    if no_eos_score is None:
        return experience.normalized_B
    return torch.where(experience.ended_B, experience.normalized_B, torch.tensor(no_eos_score))

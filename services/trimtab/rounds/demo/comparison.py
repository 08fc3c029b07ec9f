"""Two versions of a policy side by side on held-out openings: samples over the wire, a judge, KL and diversity.

The judge is one the training never saw (`judge`); what is computed from the samples is in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.rounds.answers import draw
from trimtab.rounds.evaluate import Interval, KlSummary, TextSummary, bootstrap_mean, win_rate
from trimtab_client import GeneratorClient, ModelVersion, ReferenceClient, RewardClient, Sampling


@dataclass(frozen=True)
class Samples:
    """What one version answered: S samples to each of P openings, opening after opening.

    Attributes:
        judged_PS: the judge's log-odds; probabilities_PS: its probability that the text is positive.
        rewards_PS: the reward model's normalised score.
    """

    version: ModelVersion
    openings: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    judged_PS: np.ndarray
    probabilities_PS: np.ndarray
    rewards_PS: np.ndarray
    kl: KlSummary
    text: TextSummary


@dataclass(frozen=True)
class Comparison:
    """Challenger against base."""

    base: Samples
    challenger: Samples
    win_rate: Interval
    base_probability: Interval
    challenger_probability: Interval


@dataclass(frozen=True)
class Services:
    """Clients of the services that the samples are taken and measured with."""

    generator: GeneratorClient
    reward: RewardClient
    reference: ReferenceClient


def compare(
    services: Services,
    base: ModelVersion,
    challenger: ModelVersion,
    openings: Sequence[str],
    judge: Callable[[Sequence[str]], np.ndarray],
    sampling: Sampling,
) -> Comparison:
    """Sample both versions with the same seeds; `judge` gives the log-odds of each text.

    The generator serves the challenger afterwards.
    """
    samples = [sample(services, version, openings, judge, sampling) for version in (base, challenger)]
    return Comparison(
        base=samples[0],
        challenger=samples[1],
        win_rate=win_rate(samples[1].judged_PS, samples[0].judged_PS),
        base_probability=bootstrap_mean(samples[0].probabilities_PS.mean(1)),
        challenger_probability=bootstrap_mean(samples[1].probabilities_PS.mean(1)),
    )


def sample(
    services: Services,
    version: ModelVersion,
    openings: Sequence[str],
    judge: Callable[[Sequence[str]], np.ndarray],
    sampling: Sampling,
) -> Samples:
    """Answers of one version to each opening, with the judge's and the reward model's word on them."""
    answers = draw(services.generator, version, openings, sampling)
    kl, text = answers.against_reference(services.reference)
    rewards = services.reward.score_tokens(answers.tokens, answers.tokenizer_digest).normalized_scores
    log_odds_PS = judge([openings[c.prompt_index] + c.text for c in answers.completions]).reshape(answers.shape)
    texts = answers.texts
    return Samples(
        version=version,
        openings=tuple(openings),
        texts=tuple(tuple(texts[i * sampling.n : (i + 1) * sampling.n]) for i in range(len(openings))),
        judged_PS=log_odds_PS,
        probabilities_PS=1 / (1 + np.exp(-log_odds_PS)),
        rewards_PS=rewards.reshape(answers.shape),
        kl=kl,
        text=text,
    )

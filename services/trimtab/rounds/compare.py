"""Two versions of a policy side by side on held-out openings: samples over the wire, a judge, KL and diversity.

The judge is one the training never saw (`judge`); what is computed from the samples is in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.rounds.evaluate import (
    Interval,
    KlSummary,
    TextSummary,
    bootstrap_mean,
    kl_summary,
    text_summary,
    win_rate,
)
from trimtab_client import (
    Completion,
    GeneratorClient,
    ModelVersion,
    RaggedTokens,
    ReferenceClient,
    RewardClient,
    Sampling,
)

SAMPLE_TIMEOUT_S = 900.0


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
    digest = services.generator.load_version(version).tokenizer_digest
    stream = services.generator.generate(list(openings), sampling, version=version, timeout_s=SAMPLE_TIMEOUT_S)
    completions = sorted(stream, key=lambda completion: (completion.prompt_index, completion.sample_index))
    shape = (len(openings), sampling.n)
    prompts = [completion.prompt_index for completion in completions]
    tokens = RaggedTokens.from_sequences(
        [np.concatenate([c.prompt_token_ids, c.token_ids]) for c in completions],
        prompt_lengths=[len(c.prompt_token_ids) for c in completions],
    )
    reference = services.reference.logprobs(tokens, digest, temperature=sampling.temperature).logprobs.split()
    rewards = services.reward.score_tokens(tokens, digest).normalized_scores
    log_odds_PS = judge([opening_and_answer(openings, completion) for completion in completions]).reshape(shape)
    texts = [completion.text for completion in completions]
    return Samples(
        version=version,
        openings=tuple(openings),
        texts=tuple(tuple(texts[i * sampling.n : (i + 1) * sampling.n]) for i in range(len(openings))),
        judged_PS=log_odds_PS,
        probabilities_PS=1 / (1 + np.exp(-log_odds_PS)),
        rewards_PS=rewards.reshape(shape),
        kl=kl_summary([completion.logprobs for completion in completions], reference, prompts),
        text=text_summary(texts, reference, [c.finish_reason == "stop" for c in completions], prompts),
    )


def opening_and_answer(openings: Sequence[str], completion: Completion) -> str:
    """The text the judge reads: the opening with its continuation."""
    return openings[completion.prompt_index] + completion.text

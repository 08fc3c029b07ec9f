"""What a round achieved, in numbers with their uncertainty: win rate, diversity, length, perplexity, KL.

Plain numpy on arrays that others made: the judge's scores, token ids, log-probs. `report` lays the numbers out.
Intervals are 95 % percentile bootstraps over openings (prompts), since responses to one opening are not independent.
Suffixes: P openings, S samples of an opening, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 10_000
PUNCTUATION = ".,;:!?\"'()-\u2026\u201c\u201d\u2018\u2019"


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return value < self.low or value > self.high

    def percent(self) -> str:
        """Such as "72.4 % (70.1 to 74.6)"."""
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def plain(self, digits: int = 2) -> str:
        """Such as "7.31 (6.90 to 7.72)"."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class KlSummary:
    """Divergence of the policy from the reference over its own samples.

    Attributes:
        k1_per_response: Σ_t (log π − log π_ref), nats a response; the unbiased estimator.
        k3_per_response: Σ_t (r − 1 − log r) with r = π_ref / π; never negative, lower variance.
        k1_per_40_tokens: k1 a token, times 40: comparable between runs of different response lengths.
    """

    k1_per_response: Interval
    k3_per_response: Interval
    k1_per_40_tokens: Interval


@dataclass(frozen=True)
class TextSummary:
    """Samples of one policy: diversity, length, and how likely the reference finds them.

    Attributes:
        distinct_1, distinct_2: share of distinct word n-grams in 16 responses to different openings, averaged.
        tokens_mean: tokens of a response.
        ended_share: responses that ended by themselves.
        perplexity: of the responses under the reference, a token.
    """

    distinct_1: float
    distinct_2: float
    tokens_mean: Interval
    ended_share: float
    perplexity: float


def win_rate(challenger_PS: np.ndarray, base_PS: np.ndarray, *, seed: int = 0) -> Interval:
    """How often a sample of the challenger scores above a sample of the base, to the same opening; a tie counts half.

    All S·S' pairs of an opening's samples are compared. Both arrays have a row an opening, in the same order.

    Raises:
        ValueError: the arrays do not hold the same openings.
    """
    if challenger_PS.ndim != 2 or base_PS.ndim != 2 or len(challenger_PS) != len(base_PS) or not len(base_PS):
        raise ValueError(f"scores need a row an opening, alike for both: {challenger_PS.shape} and {base_PS.shape}")
    difference = challenger_PS[:, :, None] - base_PS[:, None, :]
    wins_P = ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2))
    return bootstrap_mean(wins_P, seed=seed)


def bootstrap_mean(values_P: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean of a value an opening, with its interval."""
    return bootstrap_ratio(values_P, np.ones(len(values_P)), seed=seed)


def bootstrap_ratio(numerators_P: np.ndarray, denominators_P: np.ndarray, *, seed: int = 0) -> Interval:
    """Σ numerators / Σ denominators, resampled by unit P: for shares of pairs, or means over tokens.

    Raises:
        ValueError: there are no units, or the denominators sum to zero.
    """
    top, bottom = np.asarray(numerators_P, np.float64), np.asarray(denominators_P, np.float64)
    if not len(top) or bottom.sum() <= 0:
        raise ValueError("nothing to average: no units, or none that counts")
    generator = np.random.default_rng(seed)
    ratios = np.empty(BOOTSTRAP_DRAWS)
    for start in range(0, BOOTSTRAP_DRAWS, 500):  # 500 draws at a time: bounded memory for many units
        drawn = generator.integers(0, len(top), size=(500, len(top)))
        ratios[start : start + 500] = top[drawn].sum(1) / np.maximum(bottom[drawn].sum(1), 1e-12)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams divided by n-grams over all sequences together (Li et al. 2016); 0 where there are none.

    It falls as the number of sequences grows: compare only equal counts.
    """
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_n_in_groups(sequences: Sequence[Sequence[Hashable]], n: int, group_size: int = 16) -> float:
    """`distinct_n` of each whole group of `group_size` sequences in the order given, averaged.

    Does not depend on how many openings are evaluated. Give one response an opening, so that a group holds different
    openings. Fewer sequences than a group are taken as one.
    """
    groups = [sequences[i : i + group_size] for i in range(0, max(len(sequences) - group_size + 1, 1), group_size)]
    return float(np.mean([distinct_n(group, n) for group in groups]))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, as distinct-n counts them."""
    stripped = (word.strip(PUNCTUATION) for word in text.lower().split())
    return [word for word in stripped if word]


def perplexity(logprobs: Sequence[np.ndarray]) -> float:
    """exp(−mean log-prob) over all tokens of all responses."""
    flat = np.concatenate([np.asarray(row, np.float64) for row in logprobs]) if logprobs else np.zeros(0)
    if not flat.size:
        raise ValueError("perplexity needs at least one token")
    return float(np.exp(-flat.mean()))


def kl_summary(
    policy_logprobs: Sequence[np.ndarray],
    reference_logprobs: Sequence[np.ndarray],
    openings: Sequence[int],
    *,
    seed: int = 0,
) -> KlSummary:
    """KL of policy from reference from log-probs of the policy's samples (nats, temperature alike), a row a response.

    `openings[i]` is the opening that response i answers; the bootstrap draws openings.
    Estimators k1 and k3: Schulman, "Approximating KL divergence" (2020).

    Raises:
        ValueError: the rows do not match.
    """
    if not len(policy_logprobs) == len(reference_logprobs) == len(openings):
        raise ValueError("one row of log-probs a response is needed from both models")
    k1, k3, lengths = [], [], []
    for own, other in zip(policy_logprobs, reference_logprobs, strict=True):
        if len(own) != len(other):
            raise ValueError(f"a response has {len(own)} log-probs from the policy and {len(other)} from the reference")
        log_ratio_T = np.asarray(own, np.float64) - np.asarray(other, np.float64)
        k1.append(log_ratio_T.sum())
        k3.append((np.exp(-log_ratio_T) - 1 + log_ratio_T).sum())
        lengths.append(len(log_ratio_T))
    responses_P = sum_by(np.ones(len(k1)), openings)
    k1_P, k3_P, tokens_P = (sum_by(np.asarray(values), openings) for values in (k1, k3, lengths))
    return KlSummary(
        k1_per_response=bootstrap_ratio(k1_P, responses_P, seed=seed),
        k3_per_response=bootstrap_ratio(k3_P, responses_P, seed=seed),
        k1_per_40_tokens=bootstrap_ratio(40 * k1_P, tokens_P, seed=seed),
    )


def text_summary(
    texts: Sequence[str],
    reference_logprobs: Sequence[np.ndarray],
    ended: Sequence[bool],
    openings: Sequence[int],
    *,
    seed: int = 0,
) -> TextSummary:
    """Diversity, length and likelihood of one policy's responses; a row a response, `openings` as in `kl_summary`."""
    firsts = [words(texts[i]) for i in first_of_each(openings)]
    lengths = np.asarray([len(row) for row in reference_logprobs], np.float64)
    responses_P = sum_by(np.ones(len(texts)), openings)
    return TextSummary(
        distinct_1=distinct_n_in_groups(firsts, 1),
        distinct_2=distinct_n_in_groups(firsts, 2),
        tokens_mean=bootstrap_ratio(sum_by(lengths, openings), responses_P, seed=seed),
        ended_share=float(np.mean(ended)),
        perplexity=perplexity(reference_logprobs),
    )


def pair_accuracy(
    scores: Sequence[np.ndarray], ranks: Sequence[Sequence[int]], groups: Sequence[Hashable], *, seed: int = 0
) -> Interval:
    """Share of untied pairs that the scores order as the ranks do; equal scores count half; bootstrap over groups.

    One row of K scores and K ranks (1 best) a ranking; `groups` names the task each ranking came from.
    """
    right, pairs = [], []
    for score_K, rank_K in zip(scores, ranks, strict=True):
        better = np.asarray(rank_K)[:, None] < np.asarray(rank_K)[None, :]
        margin = (np.asarray(score_K)[:, None] - np.asarray(score_K)[None, :])[better]
        right.append((margin > 0).sum() + 0.5 * (margin == 0).sum())
        pairs.append(margin.size)
    return bootstrap_ratio(sum_by(np.asarray(right), groups), sum_by(np.asarray(pairs), groups), seed=seed)


def sum_by(values: np.ndarray, keys: Sequence[Hashable]) -> np.ndarray:
    """Sums of the values of each distinct key, in order of first appearance."""
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return np.bincount([places[key] for key in keys], weights=values, minlength=len(places))


def first_of_each(keys: Sequence[Hashable]) -> list[int]:
    """Index of the first appearance of each distinct key."""
    seen: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        seen.setdefault(key, index)
    return list(seen.values())

"""What a reward model is worth on held-out rankings, in figures; `reward_plots` draws them.

Accuracy over untied pairs, also apart for labelers that training knew and for others (InstructGPT reports both, section
4.1 and appendix E.2); calibration; what the score has to do with length. Nothing here trains or normalises.
Suffixes: B responses, P pairs, G groups, C columns of one bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking
from trimtab.trainer.rankings import forward_tokens, plan_ranking_batches, score_rankings, untied_pairs
from trimtab.trainer.ranks import ALONE, Ranks

BOOTSTRAP_DRAWS = 1000
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs that the model orders as people did; equal scores count half.

    Attributes:
        low, high: 95 % interval by bootstrap over groups of rankings (a task's rankings share their texts).
    """

    pairs: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of similar confidence: mean predicted σ(|r_a − r_b|), and how often the better-scored one was preferred."""

    predicted: float
    observed: Accuracy


@dataclass(frozen=True)
class RewardReport:
    """Held-out figures.

    Attributes:
        rankings_seen_in_training: how many of the rankings hold a text that training had; 0 if held out as they should.
        training_labelers, held_out_labelers: pairs of labelers that training knew, and of others; None where there are
            none (a row without a labeler counts in neither).
        calibration: bins of equally many pairs, from least to most confident.
        calibration_error: mean |predicted − observed| over pairs.
        score_mean, score_std: of the raw score.
        length_correlation: Pearson's r of score and response length in tokens.
        longer_preferred_by_people, longer_preferred_by_model: share of pairs of unequal length.
    """

    rankings: int
    rankings_seen_in_training: int
    accuracy: Accuracy
    training_labelers: Accuracy | None
    held_out_labelers: Accuracy | None
    accuracy_by_k: dict[int, Accuracy]
    calibration: tuple[CalibrationBin, ...]
    calibration_error: float
    score_mean: float
    score_std: float
    length_correlation: float
    longer_preferred_by_people: float
    longer_preferred_by_model: float


@dataclass(frozen=True)
class HeldOutScores:
    """Held-out rankings, and what the model makes of them: raw scores [K] of each ranking."""

    rankings: Sequence[TokenizedRanking]
    scores: tuple[np.ndarray, ...]

    @property
    def scores_B(self) -> np.ndarray:
        """Raw score of every response."""
        return np.concatenate(self.scores)

    @property
    def response_tokens_B(self) -> np.ndarray:
        """Length of every response in tokens, its end token among them."""
        return np.concatenate([_response_tokens(ranking) for ranking in self.rankings])


@torch.no_grad()
def score_held_out(
    model: ScalarModel, rankings: Sequence[TokenizedRanking], micro_batch_tokens: int, ranks: Ranks = ALONE
) -> HeldOutScores:
    """Score every held-out ranking."""
    scores = [torch.zeros(len(ranking.sequences)) for ranking in rankings]
    sizes = [forward_tokens(model, ranking) for ranking in rankings]
    for micro in ranks.plan(sizes, micro_batch_tokens, plan_ranking_batches):
        found = score_rankings(model, [rankings[i] for i in micro] or rankings[:1])
        for i, scores_K in zip(micro, found, strict=False):  # an idle rank's is not kept
            scores[i].copy_(scores_K)
    ranks.join_parts(*scores)
    return HeldOutScores(rankings, tuple(scores_K.numpy() for scores_K in scores))


def make_report(held_out: HeldOutScores, training: Sequence[TokenizedRanking] = (), seed: int = 0) -> RewardReport:
    """Compare the order of each untied pair with people's; `training` tells known labelers and texts from new ones."""
    rankings = held_out.rankings
    pairs = [untied_pairs(ranking.ranks_K) for ranking in rankings]
    margins = [score_K[won] - score_K[lost] for score_K, (won, lost) in zip(held_out.scores, pairs, strict=True)]
    margin_P = np.concatenate(margins)
    ranking_P = np.repeat(np.arange(len(rankings)), [len(margin) for margin in margins])
    correct_P = (margin_P > 0) + 0.5 * (margin_P == 0)
    groups = np.array([ranking.group or f"row {number}" for number, ranking in enumerate(rankings)])
    group_P = np.unique(groups, return_inverse=True)[1][ranking_P]

    known = {ranking.labeler for ranking in training}
    labeler_P = np.array([ranking.labeler for ranking in rankings])[ranking_P]
    size_P = np.array([len(ranking.sequences) for ranking in rankings])[ranking_P]
    named_P = labeler_P != ""
    known_P = np.isin(labeler_P, sorted(known))
    sizes = np.unique(size_P)
    confidence_P = 1 / (1 + np.exp(-np.abs(margin_P.astype(np.float64))))
    bins = np.array_split(np.argsort(confidence_P, kind="stable"), min(CALIBRATION_BINS, len(confidence_P)))
    columns = [
        np.ones(len(margin_P), bool),
        named_P & known_P,
        named_P & ~known_P,
        *(size_P == k for k in sizes),
        *(np.isin(np.arange(len(margin_P)), members) for members in bins),
    ]
    accuracies = _accuracies(correct_P, group_P, np.stack(columns, axis=1), seed)
    overall, same, new = accuracies[:3]
    calibration = tuple(
        CalibrationBin(float(confidence_P[members].mean()), accuracy)
        for members, accuracy in zip(bins, accuracies[3 + len(sizes) :], strict=True)
    )
    tokens = [_response_tokens(ranking) for ranking in rankings]
    longer_P = np.concatenate([k[won] - k[lost] for k, (won, lost) in zip(tokens, pairs, strict=True)])
    unequal = longer_P != 0
    by_people, by_model = longer_P[unequal] > 0, (longer_P[unequal] > 0) == (margin_P[unequal] > 0)
    flat_B, tokens_B = held_out.scores_B, held_out.response_tokens_B
    varies = flat_B.std() > 0 and tokens_B.std() > 0
    return RewardReport(
        rankings=len(rankings),
        rankings_seen_in_training=_seen(rankings, training),
        accuracy=overall,
        training_labelers=same if same.pairs else None,
        held_out_labelers=new if new.pairs else None,
        accuracy_by_k={int(k): accuracy for k, accuracy in zip(sizes, accuracies[3:], strict=False)},
        calibration=calibration,
        calibration_error=sum(abs(one.predicted - one.observed.share) * one.observed.pairs for one in calibration)
        / len(margin_P),
        score_mean=float(flat_B.mean()),
        score_std=float(flat_B.std()),
        length_correlation=float(np.corrcoef(flat_B, tokens_B)[0, 1]) if varies else 0.0,
        longer_preferred_by_people=float(by_people.mean()) if unequal.any() else 0.5,
        longer_preferred_by_model=float(by_model.mean()) if unequal.any() else 0.5,
    )


def _accuracies(correct_P: np.ndarray, group_P: np.ndarray, member_PC: np.ndarray, seed: int) -> list[Accuracy]:
    """Accuracy over each column's pairs; each draw of the bootstrap resamples whole groups."""
    groups = int(group_P.max()) + 1
    correct_GC, total_GC = np.zeros((2, groups, member_PC.shape[1]))
    np.add.at(correct_GC, group_P, correct_P[:, None] * member_PC)
    np.add.at(total_GC, group_P, member_PC)
    random = np.random.default_rng(seed)
    draws = np.full((BOOTSTRAP_DRAWS, member_PC.shape[1]), np.nan)
    for draw_C in draws:
        times_G = np.bincount(random.integers(0, groups, groups), minlength=groups)
        total_C = times_G @ total_GC
        np.divide(times_G @ correct_GC, total_C, out=draw_C, where=total_C > 0)
    accuracies = []
    for correct, total, draw_D in zip(correct_GC.sum(0), total_GC.sum(0), draws.T, strict=True):
        drawn = draw_D[np.isfinite(draw_D)]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (0.0, 1.0)
        accuracies.append(Accuracy(int(total), float(correct / max(total, 1)), float(low), float(high)))
    return accuracies


def _response_tokens(ranking: TokenizedRanking) -> np.ndarray:
    return np.array([len(sequence.token_ids_T) - sequence.prompt_length for sequence in ranking.sequences])


def _seen(rankings: Sequence[TokenizedRanking], training: Sequence[TokenizedRanking]) -> int:
    texts = {sequence.token_ids_T.tobytes() for ranking in training for sequence in ranking.sequences}
    return sum(any(sequence.token_ids_T.tobytes() in texts for sequence in ranking.sequences) for ranking in rankings)

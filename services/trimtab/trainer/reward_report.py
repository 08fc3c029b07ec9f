"""What a reward model is worth on held-out rankings: pair accuracy with an interval, by K, calibration, length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking
from trimtab.trainer.rankings import plan_ranking_batches, score_rankings, untied_pairs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BOOTSTRAP_DRAWS = 2000
CALIBRATION_BINS = 10


@dataclass(frozen=True)
class RewardReport:
    """Held-out figures; accuracy is over untied pairs, its 95 % interval by bootstrap over groups of rankings.

    Attributes:
        accuracy_by_k: {K: accuracy}.
        calibration: (predicted σ(r_w − r_l) of the better-scored, observed share, pairs) a bin.
        length_correlation: Pearson's r of score and length in tokens.
    """

    pairs: int
    rankings: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    accuracy_by_k: dict[int, float]
    calibration: tuple[tuple[float, float, int], ...]
    score_mean: float
    score_std: float
    length_correlation: float


@torch.no_grad()
def evaluate_rankings(
    model: ScalarModel, rankings: Sequence[TokenizedRanking], micro_batch_tokens: int, seed: int = 0
) -> RewardReport:
    """Score every held-out ranking and compare the order of each untied pair with people's."""
    scores: list[np.ndarray] = []
    for micro in plan_ranking_batches(rankings, micro_batch_tokens):
        scores += [s.float().cpu().numpy() for s in score_rankings(model, [rankings[i] for i in micro])]
    margins, correct, totals, sizes, groups = [], [], [], [], []
    for score_K, ranking in zip(scores, rankings, strict=True):
        winners, losers = untied_pairs(ranking.ranks_K)
        margin_P = score_K[winners] - score_K[losers]
        margins.append(margin_P)
        correct.append(float((margin_P > 0).sum() + 0.5 * (margin_P == 0).sum()))
        totals.append(len(margin_P))
        sizes.append(len(score_K))
        groups.append(ranking.group or f"row {len(groups)}")
    low, high = _bootstrap(np.array(correct), np.array(totals), np.array(groups), seed)
    flat = np.concatenate(scores)
    tokens = np.array([len(sequence.token_ids_T) for ranking in rankings for sequence in ranking.sequences])
    varies = flat.std() > 0 and tokens.std() > 0
    return RewardReport(
        pairs=int(sum(totals)),
        rankings=len(rankings),
        accuracy=float(sum(correct) / sum(totals)),
        accuracy_low=low,
        accuracy_high=high,
        accuracy_by_k={
            int(k): float(np.array(correct)[np.array(sizes) == k].sum() / np.array(totals)[np.array(sizes) == k].sum())
            for k in sorted(set(sizes))
        },
        calibration=_calibration(np.concatenate(margins)),
        score_mean=float(flat.mean()),
        score_std=float(flat.std()),
        length_correlation=float(np.corrcoef(flat, tokens)[0, 1]) if varies else 0.0,
    )


def write_report(report: RewardReport, folder: Path) -> None:
    """Write reward_report.json and reward_calibration.png."""
    (folder / "reward_report.json").write_text(json.dumps(asdict(report), indent=1))
    predicted, observed, pairs = (np.array(column) for column in zip(*report.calibration, strict=True))
    figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="0.7", linewidth=1, label="calibrated")
    axes.scatter(predicted, observed, s=12 + 160 * pairs / pairs.max(), color="#2b6cb0", label="held-out pairs")
    axes.set(xlabel="predicted probability of the better-scored answer", ylabel="observed share", ylim=(0.3, 1.02))
    axes.set_title(f"pair accuracy {report.accuracy:.3f} ({report.accuracy_low:.3f} to {report.accuracy_high:.3f})")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(folder / "reward_calibration.png", dpi=130)
    plt.close(figure)


def _bootstrap(correct: np.ndarray, totals: np.ndarray, groups: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of pooled accuracy, resampling whole groups (a task's rankings share their items)."""
    _, index = np.unique(groups, return_inverse=True)
    correct_G, totals_G = np.bincount(index, weights=correct), np.bincount(index, weights=totals)
    draws = np.random.default_rng(seed).integers(0, len(totals_G), (BOOTSTRAP_DRAWS, len(totals_G)))
    accuracy = correct_G[draws].sum(1) / totals_G[draws].sum(1)
    low, high = np.quantile(accuracy, [0.025, 0.975])
    return float(low), float(high)


def _calibration(margins_P: np.ndarray) -> tuple[tuple[float, float, int], ...]:
    confidence = 1 / (1 + np.exp(-np.abs(margins_P)))
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    rows = []
    for number in range(CALIBRATION_BINS):
        inside = bins == number
        if inside.any():
            rows.append((float(confidence[inside].mean()), float((margins_P[inside] > 0).mean()), int(inside.sum())))
    return tuple(rows)

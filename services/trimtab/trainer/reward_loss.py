"""The reward model's loss and its gradients: all untied pairs of each ranking from K forwards, weight 1 a prompt.

Suffixes: K responses of a prompt, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking
from trimtab.trainer.forward import negative_log_sigmoid
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.rankings import forward_tokens, plan_ranking_batches, score_rankings, untied_pairs


@dataclass(frozen=True)
class BatchLoss:
    """Means over the prompts of a batch: the loss, and the share of untied pairs in people's order."""

    loss: float
    accuracy: float


def ranking_loss(scores_K: torch.Tensor, ranks_K: np.ndarray) -> tuple[torch.Tensor, float]:
    """−(1/#pairs) Σ_{w≻l} log σ(r_w − r_l) over untied pairs (InstructGPT, arXiv:2203.02155, eq. 1), and the share of
    them in the right order."""
    winners, losers = untied_pairs(ranks_K)
    margins_P = scores_K[torch.as_tensor(winners)] - scores_K[torch.as_tensor(losers)]
    return negative_log_sigmoid(margins_P).mean(), float((margins_P.detach() > 0).float().mean())


def accumulate_pair_loss(
    model: ScalarModel, batch: Sequence[TokenizedRanking], micro_batch_tokens: int, optimizer: MasterWeightOptimizer
) -> BatchLoss:
    """Gradients of the mean loss over the batch's prompts (weight 1 each), added up in the optimizer."""
    total_loss = total_accuracy = 0.0
    sizes = [forward_tokens(model, ranking) for ranking in batch]
    for micro in plan_ranking_batches(sizes, micro_batch_tokens):
        rankings = [batch[i] for i in micro]
        results = [
            ranking_loss(scores_K, ranking.ranks_K)
            for scores_K, ranking in zip(score_rankings(model, rankings), rankings, strict=True)
        ]
        loss = torch.stack([result[0] for result in results]).sum() / len(batch)
        loss.backward()
        optimizer.accumulate()
        total_loss += float(loss.detach())
        total_accuracy += sum(result[1] for result in results) / len(batch)
    return BatchLoss(total_loss, total_accuracy)

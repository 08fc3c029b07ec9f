"""The reward model's loss and its gradients: all untied pairs of each ranking from K forwards, weight 1 a prompt.

Suffixes: K responses of a prompt, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.models.packing import pack
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking
from trimtab.trainer.forward import negative_log_sigmoid
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.rankings import forward_tokens, plan_ranking_batches, score_rankings, untied_pairs
from trimtab.trainer.side_by_side import SideBySide

SIDE_BY_SIDE_TOKENS = 2048
"""Most tokens of a micro-batch where two run at a time: more make a core no faster, and small ones share out evenly."""


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
    model: ScalarModel,
    batch: Sequence[TokenizedRanking],
    micro_batch_tokens: int,
    optimizer: MasterWeightOptimizer,
    side_by_side: SideBySide | None = None,
) -> BatchLoss:
    """Gradients of the mean loss over the batch's prompts (weight 1 each), added up in the optimizer.

    With `side_by_side` every second micro-batch goes another way at the same time; both ways' sums are added in a fixed
    order, so the result depends on the number of threads and on nothing else.
    """
    ways = side_by_side or SideBySide()
    sizes = [forward_tokens(model, ranking) for ranking in batch]
    if ways.splits:
        micro_batch_tokens = min(micro_batch_tokens, SIDE_BY_SIDE_TOKENS, -(-sum(sizes) // 4))
    ranks = optimizer.ranks
    plan = ranks.plan(sizes, micro_batch_tokens, plan_ranking_batches)
    if ranks.world > 1:
        return _backward(model, batch, plan, optimizer)
    first, second = (plan[::2], plan[1::2]) if ways.splits else (plan, [])
    halves = ways.run(
        lambda: _gradients(model, batch, first, optimizer), lambda: _gradients(model, batch, second, optimizer)
    )
    for half in halves:
        if half.gradients:
            optimizer.add(half.gradients)
    return BatchLoss(sum(half.loss for half in halves), sum(half.accuracy for half in halves))


@dataclass(frozen=True)
class _Part:
    """What some micro-batches add to the loss, the accuracy and the gradients of a batch; no gradients from none."""

    loss: float
    accuracy: float
    gradients: list[torch.Tensor]


def _backward(
    model: ScalarModel,
    batch: Sequence[TokenizedRanking],
    plan: Sequence[Sequence[int]],
    optimizer: MasterWeightOptimizer,
) -> BatchLoss:
    """The same over ranks: the backward pass itself adds up the ranks' gradients, shard by shard."""
    sums = {"loss": 0.0, "accuracy": 0.0}
    for micro in plan:
        part, accuracy = _mean_loss(model, batch, micro)
        part.backward()
        optimizer.accumulate()
        sums["loss"] += float(part.detach())
        sums["accuracy"] += accuracy
    return BatchLoss(**optimizer.ranks.add(sums))


def _mean_loss(
    model: ScalarModel, batch: Sequence[TokenizedRanking], micro: Sequence[int]
) -> tuple[torch.Tensor, float]:
    """A micro-batch's part of the batch's mean loss and accuracy; an empty one runs the model all the same."""
    if not micro:
        return model.last_token_scores(pack([np.zeros(1, dtype=np.int64)], model.device)).sum() * 0, 0.0
    rankings = [batch[i] for i in micro]
    results = [
        ranking_loss(scores_K, ranking.ranks_K)
        for scores_K, ranking in zip(score_rankings(model, rankings), rankings, strict=True)
    ]
    loss = torch.stack([result[0] for result in results]).sum() / len(batch)
    return loss, sum(result[1] for result in results) / len(batch)


def _gradients(
    model: ScalarModel,
    batch: Sequence[TokenizedRanking],
    plan: Sequence[Sequence[int]],
    optimizer: MasterWeightOptimizer,
) -> _Part:
    loss = accuracy = 0.0
    total: list[torch.Tensor] = []
    for micro in plan:
        part, share = _mean_loss(model, batch, micro)
        gradients = torch.autograd.grad(part, optimizer.parameters, materialize_grads=True)
        if not total:
            total = [g.to(master.dtype) for g, master in zip(gradients, optimizer.masters, strict=True)]
        else:
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_.add_(gradient)
        loss += float(part.detach())
        accuracy += share
    return _Part(loss, accuracy, total)

"""Rankings on the way through a model: which pairs count, and the K scores of each ranking from one packed forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.models.packing import pack
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking


def untied_pairs(ranks_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(winners, losers): every pair of responses with different ranks, the better-ranked first."""
    better = ranks_K[:, None] < ranks_K[None, :]
    winners, losers = np.nonzero(better)
    return winners, losers


def plan_ranking_batches(batch: Sequence[TokenizedRanking], max_tokens: int) -> list[list[int]]:
    """Split rankings into micro-batches of at most `max_tokens`, each ranking whole."""
    batches: list[list[int]] = []
    room = -1
    for index, ranking in enumerate(batch):
        size = sum(len(sequence.token_ids_T) for sequence in ranking.sequences)
        if size > room or not batches:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= size
    return batches


def score_rankings(model: ScalarModel, rankings: Sequence[TokenizedRanking]) -> tuple[torch.Tensor, ...]:
    """Raw scores [K] of each ranking's responses, from one packed forward of all of them."""
    sequences = [sequence.token_ids_T for ranking in rankings for sequence in ranking.sequences]
    scores = model.last_token_scores(pack(sequences, model.device))
    return scores.split([len(ranking.sequences) for ranking in rankings])

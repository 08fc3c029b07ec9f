"""Rankings on the way through a model: which pairs count, and the K scores of each ranking from one packed forward.

The K sequences of a ranking begin with the same prompt. Where the model allows it, the prompt is computed once for all.
Suffixes: K responses of a prompt, P pairs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.models.packing import pack, pack_sets, shared_beginning
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.data import TokenizedRanking


def untied_pairs(ranks_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(winners, losers): every pair of responses with different ranks, the better-ranked first."""
    better = ranks_K[:, None] < ranks_K[None, :]
    winners, losers = np.nonzero(better)
    return winners, losers


def forward_tokens(model: ScalarModel, ranking: TokenizedRanking) -> int:
    """Tokens that a forward of one ranking computes."""
    sequences = _sequences(ranking)
    total = sum(len(token_ids_T) for token_ids_T in sequences)
    return total - (len(sequences) - 1) * shared_beginning(sequences) if model.shares_beginnings else total


def plan_ranking_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split rankings of `sizes` tokens into micro-batches of at most `max_tokens`, in order, each ranking whole."""
    batches: list[list[int]] = []
    room = -1
    for index, size in enumerate(sizes):
        if size > room or not batches:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= size
    return batches


def score_rankings(model: ScalarModel, rankings: Sequence[TokenizedRanking]) -> tuple[torch.Tensor, ...]:
    """Raw scores [K] of each ranking's responses, from one packed forward of all of them."""
    sets = [_sequences(ranking) for ranking in rankings]
    if model.shares_beginnings:
        packed = pack_sets(sets, model.device)
    else:
        packed = pack([token_ids_T for members in sets for token_ids_T in members], model.device)
    return model.last_token_scores(packed).split([len(members) for members in sets])


def _sequences(ranking: TokenizedRanking) -> list[np.ndarray]:
    return [sequence.token_ids_T for sequence in ranking.sequences]

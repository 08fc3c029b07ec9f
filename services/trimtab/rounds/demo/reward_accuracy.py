"""How well a served reward model orders held-out rankings as people did, asked over the wire."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trimtab.models.tokenizers import load_tokenizer
from trimtab.rounds.demo.figures import Accuracy
from trimtab.rounds.evaluate import pair_accuracy
from trimtab.trainer.data import TokenizedRanking, load_rankings, tokenize_rankings
from trimtab.weights.store import open_store
from trimtab_client import ModelVersion, RaggedTokens, RewardClient


def reward_accuracies(
    reward: RewardClient, store_url: str, version: ModelVersion, rankings: Mapping[str, tuple[Path, str]]
) -> tuple[Accuracy, ...]:
    """Held-out accuracy over the wire by kind of ranking; `rankings` maps a name to (file, group prefix)."""
    tokenizer = load_tokenizer(str(open_store(store_url).fetch(version)))
    info = reward.get_model()
    accuracies = []
    for name, (file, prefix) in rankings.items():
        rows = [row for row in load_rankings(str(file)) if row.group.startswith(prefix)]
        eos = info.eos_token_ids[0] if info.eos_token_ids else None
        tokenized: list[TokenizedRanking] = list(tokenize_rankings(rows, tokenizer, info.max_length, eos_token_id=eos))
        sequences = [sequence.token_ids_T for ranking in tokenized for sequence in ranking.sequences]
        scores = reward.score_tokens(RaggedTokens.from_sequences(sequences), info.tokenizer_digest).scores
        parts, start = [], 0
        for ranking in tokenized:
            parts.append(scores[start : start + len(ranking.sequences)])
            start += len(ranking.sequences)
        ranks = [ranking.ranks_K.tolist() for ranking in tokenized]
        pairs = sum(a < b for row in ranks for a in row for b in row)
        groups = [ranking.group for ranking in tokenized]
        accuracies.append(Accuracy(name, pair_accuracy(parts, ranks, groups), pairs))
    return tuple(accuracies)

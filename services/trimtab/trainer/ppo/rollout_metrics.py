"""What a step's rollouts looked like before the update; the names are those of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.kernels import kl
from trimtab.trainer.ppo.advantages import explained_variance
from trimtab.trainer.ppo.experience import Episode, Experience
from trimtab.trainer.ppo.update import Targets


def staleness_mean(episodes: Sequence[Episode], step: int) -> float:
    """Versions between sampling and training, averaged over response tokens; 0 is strictly on-policy."""
    runs = [run for episode in episodes for run in episode.completion.versions]
    tokens = sum(run.token_count for run in runs)
    return sum((step - 1 - run.version.step) * run.token_count for run in runs) / max(1, tokens)


def rollout_metrics(experience: Experience, targets: Targets) -> dict[str, float]:
    """Scores, KL in nats a sequence (by k1, by k3 and, where measured, exact), entropy, lengths, and log-prob gaps
    where the old log-probs are not the generator's own."""
    lengths_B = experience.lengths_B
    episodes = len(lengths_B)
    metrics = {
        "score_mean": float(experience.scores_B.mean()),
        "score_std": float(experience.scores_B.std(unbiased=False)),
        "normalized_score_mean": float(experience.normalized_B.mean()),
        "kl_nats_per_sequence": float(kl.k1(targets.old_R, experience.reference_R).sum()) / episodes,
        "kl_k3_nats_per_sequence": float(kl.k3(targets.old_R, experience.reference_R).sum()) / episodes,
        "entropy_mean": float(targets.entropy_R.mean()),
        "explained_variance": explained_variance(targets.old_values_R, targets.returns_R),
        "response_length_mean": float(lengths_B.float().mean()),
        "eos_fraction": float(experience.ended_B.float().mean()),
    }
    if targets.old_lse_R is not None:
        gap_R = (targets.old_R - experience.behaviour_R).abs()
        metrics |= {
            "logprob_gap_mean": float(gap_R.mean()),
            "logprob_gap_max": float(gap_R.max()),
            "importance_weight_mean": float(targets.weights_R.mean()),
        }
    if experience.gold_B is not None:
        metrics["gold_score_mean"] = float(experience.gold_B.mean())
    if targets.exact_kl is not None:
        metrics |= targets.exact_kl.metrics(episodes)
    return metrics

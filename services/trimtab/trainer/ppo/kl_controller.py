"""The KL coefficient β: fixed, or adapted so that the KL of a sequence stays near a target (Ziegler 2019, sec. 2.2)."""

from __future__ import annotations


class KLController:
    """β and how it moves.

    error = clip(KL / target − 1, −0.2, 0.2); β *= 1 + error · episodes / horizon. The KL is in nats per
    *sequence* (k1, summed over a response, averaged over episodes); other systems feed nats per token.
    """

    def __init__(self, coefficient: float, target_nats_per_sequence: float | None, horizon_episodes: float) -> None:
        self.coefficient = coefficient
        self.target_nats_per_sequence = target_nats_per_sequence
        self.horizon_episodes = horizon_episodes

    def update(self, kl_nats_per_sequence: float, episodes: int) -> None:
        """Move β after a step of `episodes` episodes; fixed without a target."""
        if self.target_nats_per_sequence is None:
            return
        error = min(0.2, max(-0.2, kl_nats_per_sequence / self.target_nats_per_sequence - 1))
        self.coefficient *= 1 + error * episodes / self.horizon_episodes

"""What a side of the PPO comparison is asked for, and what it answers; the stages both are told apart by.

| stage | TRL's PPOTrainer | trimtab |
|---|---|---|
| experience | the next three one after another | prompts sent until scores and reference log-probs are there |
| · rollout | generate, its log-probs | prompts sent until the last completion arrived |
| · reference | one padded forward | waited for after the last completion (else it overlaps) |
| · reward | one padded forward | waited for after the last completion (else it overlaps) |
| values | value model's forward | value model's forward, and old log-probs if they are the trainer's |
| train | minibatch steps, their statistics | minibatch steps, their statistics |
| publish | nothing: one process | a version to the store, verified and loaded by the generator |
| other | advantages, logging | advantages are in values; logging, files |
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

STAGES = ("experience", "rollout", "reference", "reward", "values", "train", "publish", "other")
PARTS_OF_EXPERIENCE = ("rollout", "reference", "reward")
COMPARED = ("update", "experience", "rollout", "values", "train")  # the others mean different things on the two sides


@dataclass(frozen=True)
class Case:
    """One comparison: the dtype of every model's compute, the cores each side may use, and the responses' lengths."""

    dtype: str
    threads: int
    ragged: bool

    def __str__(self) -> str:
        lengths = "ragged" if self.ragged else "equal"
        return f"{self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}, {lengths} lengths"


@dataclass(frozen=True)
class SideRun:
    """What one run of a side measured.

    Attributes:
        updates: seconds by stage of each measured update (the first is left out), with the whole under "update".
        optimizer_steps: of one update.
        cores_used: mean cores that all its processes together kept busy during its updates.
        peak_rss_mb: of all its processes together; shared file pages count once.
    """

    side: str
    updates: tuple[dict[str, float], ...]
    optimizer_steps: float
    cores_used: float
    peak_rss_mb: float


def medians(runs: list[SideRun]) -> dict[str, float]:
    """Median seconds by stage over the measured updates of all runs of a side."""
    updates = [update for run in runs for update in run.updates]
    return {stage: median(update[stage] for update in updates) for stage in ("update", *STAGES)}

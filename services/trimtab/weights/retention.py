"""Which versions may go. The plan is made here, without touching the store."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trimtab.weights.manifest import Manifest


@dataclass(frozen=True)
class Retention:
    """Keeps the ``keep_last`` newest versions and the ``keep_best`` best by ``best_metric`` (none if None).

    The current version, the pinned ones and the parents of deltas that stay are kept whatever this says.
    """

    keep_last: int = 3
    best_metric: str | None = None
    keep_best: int = 1
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last is {self.keep_last}: at least the newest version is kept")
        if self.keep_best < 0:
            raise ValueError(f"keep_best is {self.keep_best}: it cannot be negative")


def versions_to_prune(
    manifests: Iterable[Manifest], policy: Retention, *, current_step: int | None, pinned_steps: Iterable[int]
) -> list[Manifest]:
    """The versions of one model that ``policy`` lets go, oldest first."""
    ordered = sorted(manifests, key=lambda manifest: manifest.version.step)
    kept = {manifest.version.step for manifest in ordered[-policy.keep_last :]} | set(pinned_steps)
    if current_step is not None:
        kept.add(current_step)
    kept |= {manifest.version.step for manifest in best_versions(ordered, policy)}
    kept_parents = _chain_steps(ordered, kept)
    return [manifest for manifest in ordered if manifest.version.step not in kept | kept_parents]


def best_versions(manifests: Sequence[Manifest], policy: Retention) -> list[Manifest]:
    """The best by the policy's metric, best first, the newer of equals first; without that metric none wins."""
    metric = policy.best_metric
    if metric is None:
        return []
    sign = 1.0 if policy.higher_is_better else -1.0
    rated = [manifest for manifest in manifests if math.isfinite(manifest.metrics.get(metric, math.nan))]
    rated.sort(key=lambda manifest: (sign * manifest.metrics[metric], manifest.version.step), reverse=True)
    return rated[: policy.keep_best]


def _chain_steps(manifests: Sequence[Manifest], kept: set[int]) -> set[int]:
    """Steps that the kept deltas are built on, all the way to a full version."""
    by_name = {str(manifest.version): manifest for manifest in manifests}
    needed: set[int] = set()
    for manifest in manifests:
        while manifest is not None and manifest.version.step in kept | needed and manifest.kind == "delta":
            manifest = by_name.get(manifest.parent or "")
            if manifest is None or manifest.version.step in needed:
                break
            needed.add(manifest.version.step)
    return needed

"""What a stage gets from the service that runs it: the store, the run, a folder, the device, and how to publish."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.run import Run
from trimtab.weights.sources import ResolvedSource, resolve_source
from trimtab.weights.store import Store
from trimtab_client import ModelVersion


@dataclass(frozen=True)
class StageContext:
    """Everything around a stage.

    Attributes:
        folder: where the run's metrics and reports go.
        threads: compute threads while the trainer alone works.
        keep_versions: newest versions of a run that stay in the store.
    """

    run: Run
    store: Store
    folder: Path
    device: str
    threads: int
    keep_versions: int

    def resolve(self, source: str) -> ResolvedSource:
        """A folder, hub id or "version:RUN/NAME[@STEP]" as a folder or id to load."""
        return resolve_source(source, self.store)

    def publish(
        self,
        model: Policy | ScalarModel,
        name: str,
        step: int,
        *,
        lineage: Mapping[str, str],
        metrics: Mapping[str, float],
    ) -> ModelVersion:
        """Save a model in its compute dtype and publish it as run/`name`@`step`, the pointer moved to it."""
        run_id = self.run.snapshot.run_id
        with tempfile.TemporaryDirectory(prefix="trimtab-publish-") as folder:
            model.save(Path(folder))
            finite = {key: value for key, value in metrics.items() if value == value and abs(value) != float("inf")}
            manifest = self.store.publish(
                Path(folder), run_id=run_id, name=name, step=step, lineage=dict(lineage), metrics=finite
            )
        self.run.published(manifest.version)
        self.store.prune(run_id, name, keep_last=self.keep_versions)
        return manifest.version

    def use_threads(self) -> None:
        """Take the trainer's whole thread budget (it alone works now)."""
        torch.set_num_threads(self.threads)

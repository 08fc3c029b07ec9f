"""What a stage gets from the service that runs it: the store, the run, its folder and state, the device; publishing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trimtab.models.lora import save_adapter
from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.trainer.durable import fsync_file
from trimtab.trainer.gather import save_gathered
from trimtab.trainer.metric_sinks import METRICS
from trimtab.trainer.metrics import MetricWriter, NoMetrics, reported
from trimtab.trainer.ranks import ALONE, Ranks
from trimtab.trainer.run import Run, RunState, StopRun
from trimtab.trainer.run_record import RunFolder
from trimtab.trainer.state import Checkpoints, TrainingState
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.lease import Lease
from trimtab.weights.sources import ResolvedSource, resolve_source
from trimtab.weights.store import Store
from trimtab_client import ChannelOptions, ModelVersion

AVERAGE = "policy-ema"
"""The name under which a policy's moving average is published, just before the policy itself."""


@dataclass(frozen=True)
class StageContext:
    """Everything around a stage.

    Attributes:
        lease: the right to publish this run, which one trainer has at a time; rank 0 holds it.
        folder: where the run's metrics and reports go, and in `state` what a resume needs.
        threads: compute threads while the trainer alone works.
        keep_versions: newest versions of a run that stay in the store.
        services: TLS and token towards the services that a stage calls.
        full_version_every: of so many versions one is full, the rest say what changed (half precision only).
        ranks: the processes that train together; all see `folder` and the store.
    """

    run: Run
    store: Store
    lease: Lease | None
    folder: Path
    device: str
    threads: int
    keep_versions: int
    services: ChannelOptions = field(default_factory=ChannelOptions)
    full_version_every: int = 1
    ranks: Ranks = ALONE

    def resolve(self, source: str) -> ResolvedSource:
        """A folder, hub id or "version:RUN/NAME[@STEP]" as a folder or id to load; a resumed run gets the same."""
        found = resolve_source(self.state.pinned(source), self.store)
        if found.manifest is not None:
            self.state.pin(source, f"version:{found.version}")
        return found

    @property
    def state(self) -> RunFolder:
        """The run's identity, checkpoints and journal on disk."""
        return RunFolder(self.folder)

    def restore(self) -> TrainingState | None:
        """The newest durable state of this run; None where it starts from the beginning."""
        return Checkpoints(self.state.checkpoints, self.ranks).newest()

    def save(self, state: TrainingState) -> None:
        """Make a state durable."""
        self.run.doing(f"saving the state of step {state.step}")
        if self.ranks.leads and (rows := self.folder / METRICS).exists():
            fsync_file(rows)  # the journal forgets a step once its checkpoint is there, so its row must be too
        Checkpoints(self.state.checkpoints, self.ranks).save(state)

    def between_steps(
        self, step: int, every: int, take: Callable[[], TrainingState], publish: Callable[[], ModelVersion]
    ) -> None:
        """Save every so many steps, and before a requested checkpoint is published or a stop ends the run.

        So no version is ever newer than what a resume replays. Raises StopRun.
        """
        if step % every == 0:
            self.save(take())

        def publish_durably() -> ModelVersion:
            self.save(take())
            return publish()

        try:
            self._serve_requests(publish_durably)
        except StopRun:
            self.save(take())
            raise

    def _serve_requests(self, publish: Callable[[], ModelVersion]) -> None:
        """`Run.between_steps` on every rank: what rank 0 is asked for, all do together. Raises StopRun."""
        if self.ranks.world == 1:
            self.run.between_steps(publish)
        elif self.ranks.leads:

            def publish_together() -> ModelVersion:
                self.ranks.told(lambda: True)
                return publish()

            def go_on() -> bool:
                self.run.between_steps(publish_together)
                return False

            self.ranks.told(go_on)
        else:
            while self.ranks.told(lambda: False):
                publish()

    def publish(
        self,
        model: Policy | ScalarModel,
        name: str,
        step: int,
        *,
        lineage: Mapping[str, str],
        metrics: Mapping[str, float],
        base: ModelVersion | None = None,
    ) -> ModelVersion:
        """Save a model in its compute dtype and publish it as run/`name`@`step`, the pointer moved to it.

        With `base` its adapters alone are published, as those of that version.
        """
        run_id = self.run.snapshot.run_id
        finite = {key: value for key, value in metrics.items() if value == value and abs(value) != float("inf")}

        def put(folder: Path) -> ModelVersion:
            manifest = self.store.publish(
                folder,
                run_id=run_id,
                name=name,
                step=step,
                lineage=dict(lineage),
                metrics=finite,
                lease=self.lease,
                deltas=self._deltas(model),
                base=base,
            )
            self.store.prune(run_id, name, keep_last=self.keep_versions)
            return manifest.version

        with tempfile.TemporaryDirectory(prefix="trimtab-publish-") as folder:
            if base is not None:
                save_adapter(model.model, Path(folder), base)
            elif self.ranks.world == 1:
                model.save(Path(folder))
            else:
                save_gathered(model, Path(folder), self.ranks)
            version = self.ranks.told(lambda: put(Path(folder)))
        self.run.published(version)
        return version

    def _deltas(self, model: Policy | ScalarModel) -> Deltas | None:
        """None for float32, where a step changes nearly every element."""
        return Deltas(self.full_version_every) if model.dtype in ("bfloat16", "float16") else None

    def end(self, state: RunState) -> None:
        """Note how the run ended; one that succeeded needs its checkpoints and journal no more."""
        self.state.end(state.name.lower())
        if state is RunState.SUCCEEDED:
            Checkpoints(self.state.checkpoints).clear()
            self.state.journal.unlink(missing_ok=True)

    def open_metrics(self, total_steps: int, done_steps: int) -> MetricWriter:
        """The writer of the run's metrics, which goes on behind the steps that are done; 0 for a run that begins."""
        if not self.ranks.leads:
            return NoMetrics()
        known = reported(self.folder, total_steps, done_steps)
        self.run.plan(total_steps)
        self.run.recall(known, published_before(self.run.snapshot.run_id, self.store) if done_steps else [])
        return MetricWriter(self.run, self.folder, known)

    def use_threads(self) -> None:
        """Take the trainer's whole thread budget (it alone works now)."""
        torch.set_num_threads(self.threads)


def published_before(run_id: str, store: Store) -> list[ModelVersion]:
    """Versions of a run that the store holds, by step, an average before the model it is of."""
    versions = [manifest.version for manifest in store.versions(run_id)]
    return sorted(versions, key=lambda version: (version.step, version.name != AVERAGE))

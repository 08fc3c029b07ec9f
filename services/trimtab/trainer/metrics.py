"""Where the metrics of a step go: a JSONL file, TensorBoard, Prometheus, and the run's watchers; one name each."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from prometheus_client import Gauge
from torch.utils.tensorboard import SummaryWriter

from trimtab.trainer.run import Run, StepMetrics

METRIC = Gauge("trimtab_trainer_metric", "Newest value of a training metric.", ["run_id", "stage", "metric"])


class MetricWriter:
    """Writes each step's metrics to `folder`/metrics.jsonl and `folder`/tensorboard, and hands them to the run."""

    def __init__(self, run: Run, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._lines = (folder / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._board.close()
        self._lines.close()

    def write(self, step: int, total_steps: int, values: dict[str, float]) -> None:
        """Record one step. NaN and infinite values are kept out of JSON's numbers as null."""
        now = datetime.now(UTC)
        snapshot = self._run.snapshot
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"run_id": snapshot.run_id, "stage": snapshot.stage, "step": step, "time": now.isoformat(), **finite}
        self._lines.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{snapshot.stage}/{name}", value, step)
            METRIC.labels(snapshot.run_id, snapshot.stage, name).set(value)
        self._run.report(StepMetrics(step, total_steps, values, now))

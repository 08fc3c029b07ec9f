"""Where a step's metrics are written: one small class a place, all of one protocol.

To add a place, write a class with `write` and `close` and name it in `open_sinks`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from prometheus_client import Gauge
from torch.utils.tensorboard import SummaryWriter

from trimtab.runtime.logs import get_logger

log = get_logger(__name__)
METRICS = "metrics.jsonl"
METRIC = Gauge("trimtab_trainer_metric", "Newest value of a training metric.", ["run_id", "stage", "metric"])


@dataclass(frozen=True)
class MetricRow:
    """The metrics of one step of one run."""

    run_id: str
    stage: str
    step: int
    time: datetime
    values: Mapping[str, float]


class MetricSink(Protocol):
    """One place for metrics. Both methods may block for a moment; neither may raise for a place that is away."""

    def write(self, row: MetricRow) -> None:
        """Record one step; steps only grow."""
        ...

    def close(self) -> None:
        """Finish what was written."""
        ...


class JsonLines:
    """`folder`/metrics.jsonl; NaN and infinite values as null."""

    def __init__(self, folder: Path) -> None:
        self._lines = (folder / METRICS).open("a", buffering=1)

    def write(self, row: MetricRow) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in row.values.items()}
        head = {"run_id": row.run_id, "stage": row.stage, "step": row.step, "time": row.time.isoformat()}
        self._lines.write(json.dumps(head | finite) + "\n")

    def close(self) -> None:
        self._lines.close()


class TensorBoard:
    """`folder`/tensorboard; rows from `purge_step` on that are there already are hidden."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        board = folder / "tensorboard"
        _wait_for_a_second_without_events(board)
        self._board = SummaryWriter(str(board), purge_step=purge_step)

    def write(self, row: MetricRow) -> None:
        for name, value in row.values.items():
            self._board.add_scalar(f"{row.stage}/{name}", value, row.step)

    def close(self) -> None:
        self._board.close()


def _wait_for_a_second_without_events(board: Path) -> None:
    """TensorBoard reads files in the order of their names, which tell seconds: two of one second may change places."""
    while any(board.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
        time.sleep(0.05)


class Prometheus:
    """The gauge that the trainer's metrics port shows. A run that ended keeps its newest values, but warns no more."""

    def __init__(self) -> None:
        self._warnings: set[tuple[str, str, str]] = set()

    def write(self, row: MetricRow) -> None:
        for name, value in row.values.items():
            labels = (row.run_id, row.stage, name)
            METRIC.labels(*labels).set(value)
            if name.startswith("warning_"):
                self._warnings.add(labels)

    def close(self) -> None:
        for labels in self._warnings:
            METRIC.labels(*labels).set(0.0)


class WeightsAndBiases:
    """A W&B run of the same id, resumed if it is there; project and the rest by W&B's own environment variables.

    Where W&B is away or refuses the key, the run is kept on disk, for `wandb sync` to send later.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]  # optional: open_sinks looks whether it is there

        begin = partial(wandb.init, id=run_id, name=run_id, dir=str(folder))
        try:
            self._run = begin(resume="allow")
        except wandb.Error as error:
            wandb.teardown()  # its process still holds the run's id
            self._run = begin(mode="offline")
            advice = f"send it with `wandb sync {Path(self._run.dir).parent}` once W&B can be reached"
            log.warning("the W&B run is kept offline", run_id=run_id, reason=str(error), advice=advice)

    def write(self, row: MetricRow) -> None:
        self._run.log({f"{row.stage}/{name}": value for name, value in row.values.items()}, step=row.step, commit=True)

    def close(self) -> None:
        self._run.finish()


def open_sinks(folder: Path, run_id: str, purge_step: int | None) -> list[MetricSink]:
    """All places of a run. `purge_step`: the first step of a run that goes on, None for a new one."""
    sinks: list[MetricSink] = [JsonLines(folder), TensorBoard(folder, purge_step), Prometheus()]
    if os.environ.get("WANDB_PROJECT") and importlib.util.find_spec("wandb"):
        sinks.append(WeightsAndBiases(folder, run_id))
    return sinks

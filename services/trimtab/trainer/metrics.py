"""The metrics of a step on their way to every sink and to the run's watchers; one name each.

A run that goes on takes up the rows it wrote before: each step is there once.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from trimtab.runtime.logs import get_logger
from trimtab.trainer.durable import write_bytes
from trimtab.trainer.metric_sinks import METRICS, MetricRow, open_sinks
from trimtab.trainer.run import Run, StepMetrics
from trimtab.trainer.warning_signs import WarningWatch

log = get_logger(__name__)


class MetricWriter:
    """Writes each step's metrics to all sinks (metric_sinks.py), and hands them to the run.

    Attributes:
        last_step: of the rows so far; 0 for none.
    """

    def __init__(self, run: Run, folder: Path, known: Sequence[StepMetrics] = ()) -> None:
        """`known` are the steps that `reported` gave."""
        folder.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._watch = WarningWatch([event.values for event in known])
        self.last_step = known[-1].step if known else 0
        self._sinks = open_sinks(folder, run.snapshot.run_id, self.last_step + 1 if known else None)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sink in self._sinks:
            sink.close()

    def _warn(self, values: dict[str, float]) -> dict[str, float]:
        """The step's warning metrics; what is new is logged and said beside what the run is doing."""
        before = self._watch.standing
        metrics = self._watch.judge(values)
        for name, text in self._watch.standing.items():
            if name not in before:
                log.warning(name.replace("_", " "), run_id=self._run.snapshot.run_id, seen=text)
            self._run.hindered(f"warning {name}", f"warning: {text}")
        for name in before.keys() - self._watch.standing.keys():
            self._run.hindered(f"warning {name}", "")
        return metrics

    def write(self, step: int, total_steps: int, values: dict[str, float]) -> None:
        """Record one step everywhere."""
        now = datetime.now(UTC)
        snapshot = self._run.snapshot
        values = values | self._warn(values)
        row = MetricRow(snapshot.run_id, snapshot.stage, step, now, values)
        for sink in self._sinks:
            sink.write(row)
        self.last_step = step
        self._run.report(StepMetrics(step, total_steps, values, now))


class NoMetrics(MetricWriter):
    """The writer of ranks that report nothing: rank 0 has the same metrics."""

    def __init__(self) -> None:
        self.last_step = sys.maxsize

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def write(self, step: int, total_steps: int, values: dict[str, float]) -> None:
        """Nothing."""


def reported(folder: Path, total_steps: int | None = None, up_to_step: int | None = None) -> list[StepMetrics]:
    """The steps in `folder`/metrics.jsonl; those after `up_to_step`, which will be computed again, are taken out."""
    rows = keep_rows(folder / METRICS, up_to_step)
    total = total_steps if total_steps is not None else max((row["step"] for row in rows), default=0)
    return [_event(row, total) for row in rows]


def keep_rows(path: Path, up_to_step: int | None) -> list[dict[str, Any]]:
    """Rewrite a JSONL file without a last line that a kill cut off, and without rows of later steps; its rows."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    kept = [row for row in rows if up_to_step is None or row["step"] <= up_to_step]
    if len(kept) < len(lines):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_bytes(path, text.encode())
    return kept


def _event(row: dict[str, Any], total_steps: int) -> StepMetrics:
    names = row.keys() - {"run_id", "stage", "step", "time"}
    values = {name: math.nan if row[name] is None else float(row[name]) for name in row if name in names}
    return StepMetrics(row["step"], total_steps, values, datetime.fromisoformat(row["time"]))

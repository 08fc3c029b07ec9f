"""Every sink of a run gets every step; Weights & Biases too, where it is installed and a project is named."""

from pathlib import Path

import pytest

from trimtab.trainer.metric_sinks import WeightsAndBiases, open_sinks
from trimtab.trainer.metrics import MetricWriter
from trimtab.trainer.run import Run


def kinds(folder: Path) -> set[str]:
    folder.mkdir(exist_ok=True)
    sinks = open_sinks(folder, "kinds", None)
    for sink in sinks:
        sink.close()
    return {type(sink).__name__ for sink in sinks}


def test_files_tensorboard_and_prometheus_are_always_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert kinds(tmp_path) == {"JsonLines", "TensorBoard", "Prometheus"}


def test_a_run_is_written_for_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "trimtab")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricWriter(Run("run-1", "ppo"), tmp_path) as writer:
        assert wandb.run.id == "run-1" and wandb.run.project == "trimtab"
        for step in (1, 2):
            writer.write(step, 2, {"loss": 0.5 / step})
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-run-1.wandb")
    assert log.stat().st_size > 0
    assert WeightsAndBiases.__name__ in kinds(tmp_path / "other")

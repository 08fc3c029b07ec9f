"""Every sink of a run gets every step; Weights & Biases too, where it is installed and a project is named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from trimtab.rounds.launchers.services import free_ports
from trimtab.runtime.logs import configure_logs
from trimtab.trainer.metric_sinks import WeightsAndBiases, open_sinks
from trimtab.trainer.metrics import MetricWriter, reported
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


def test_tensorboard_shows_each_step_of_a_run_that_went_on_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second file's name stands before the first's, if both are of one second.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    with MetricWriter(Run("run-1", "ppo"), tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, 4, {"loss": float(step)})
    known = reported(tmp_path, 4, up_to_step=2)
    with MetricWriter(Run("run-1", "ppo"), tmp_path, known) as writer:
        for step in (3, 4):
            writer.write(step, 4, {"loss": 10.0 * step})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("ppo/loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


@pytest.fixture
def wandb() -> Iterator[Any]:
    """The library, which keeps the settings that it began with until it is torn down."""
    library = pytest.importorskip("wandb")
    yield library
    library.teardown()


def test_a_run_is_written_for_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: Any) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "trimtab")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricWriter(Run("run-1", "ppo"), tmp_path) as writer:
        assert wandb.run.id == "run-1" and wandb.run.project == "trimtab"
        for step in (1, 2):
            writer.write(step, 2, {"loss": 0.5 / step})
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-run-1.wandb")
    assert log.stat().st_size > 0
    assert WeightsAndBiases.__name__ in kinds(tmp_path / "other")


@pytest.mark.slow  # W&B asks again for ten seconds
def test_a_run_goes_on_where_weights_and_biases_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wandb: Any
) -> None:
    configure_logs("info", "json")
    monkeypatch.setenv("WANDB_PROJECT", "trimtab")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with MetricWriter(Run("run-1", "ppo"), tmp_path) as writer:
        writer.write(1, 1, {"loss": 0.5})
    assert list((tmp_path / "wandb").glob("offline-run-*/run-run-1.wandb"))
    assert "kept offline" in capsys.readouterr().err

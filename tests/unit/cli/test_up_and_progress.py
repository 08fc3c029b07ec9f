"""Promises of `trimtab up`'s file and of what is shown with and without a terminal."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from trimtab.cli.errors import CommandError
from trimtab.cli.progress import RunProgress, format_metrics
from trimtab.cli.up_config import load_up_config, process_specs
from trimtab.cli.up_view import UpView, status_table
from trimtab.rounds.launchers.process import ProcessState, ProcessStatus


def write(folder: Path, text: str) -> Path:
    path = folder / "up.yaml"
    path.write_text(text)
    return path


def test_services_get_default_ports_the_shared_store_and_a_share_of_the_cores(tmp_path: Path) -> None:
    text = f"folder: {tmp_path}\nstore: /s\nthreads: 3\ngenerator: {{model: m}}\ntrainer:\n"
    specs = process_specs(load_up_config(write(tmp_path, text)))
    assert [(s.name, s.address) for s in specs] == [("generator", "127.0.0.1:7101"), ("trainer", "127.0.0.1:7104")]
    assert all(s.env["OMP_NUM_THREADS"] == "3" for s in specs)
    settings = yaml.safe_load((tmp_path / "generator.yaml").read_text())
    assert settings["store"] == "/s" and settings["model"] == "m" and settings["metrics_port"] == 9101


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("generater: {}", "unknown key 'generater'; did you mean 'generator'"),
        ("store: x", "no service; add a section"),
        ("- generator", "found a list"),
        ("generator: {model: m", r"up.yaml \(line 1, column 21\)"),
        ("generator: {model: m, port: -1}", "generator: port: .*greater than or equal to 0"),
        ("trainer: {}\ngrace_s: long", "grace_s: .*number"),
    ],
)
def test_a_wrong_up_file_is_named_before_anything_starts(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        load_up_config(write(tmp_path, text))


def test_an_absent_up_file_says_how_to_come_by_one(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="section per service, as examples"):
        load_up_config(tmp_path / "up.yaml")


def status(state: ProcessState, message: str = "") -> ProcessStatus:
    return ProcessStatus("reward", state, "127.0.0.1:7102", 42, 1, message, Path("reward.log"), time.monotonic())


def test_up_prints_plain_lines_without_a_terminal_and_a_table_on_one() -> None:
    pipe = io.StringIO()
    with UpView(Console(file=pipe)) as view:
        view.event(status(ProcessState.SERVING, "on 127.0.0.1:7102"))
    assert pipe.getvalue() == "reward: serving on 127.0.0.1:7102\n"
    screen = Console(file=io.StringIO(), width=120, record=True)
    screen.print(status_table((status(ProcessState.SERVING),)))
    assert "127.0.0.1:7102" in (shown := screen.export_text()) and "serving" in shown and "42" in shown


def test_progress_is_one_line_a_step_without_a_terminal() -> None:
    pipe = io.StringIO()
    with RunProgress("sft", Console(file=pipe)) as progress:
        progress.activity("training")
        progress.step(3, 100, {"loss": 2.3456789, "grad_norm_policy": 1.0, "learning_rate": 1e-3})
    assert pipe.getvalue() == "step 3/100 loss=2.346 learning_rate=0.001\n"


def test_progress_on_a_terminal_shows_the_bar_with_metrics() -> None:
    screen = io.StringIO()
    with RunProgress("ppo", Console(file=screen, force_terminal=True, width=160)) as progress:
        progress.step(5, 10, {"normalized_score_mean": 0.5})
    assert "normalized_score_mean=0.5" in screen.getvalue() and "5/10" in screen.getvalue()


def test_metrics_without_main_ones_show_the_first_few() -> None:
    assert format_metrics("sft", {"b": 2.0, "a": 1.0}) == "a=1 b=2"

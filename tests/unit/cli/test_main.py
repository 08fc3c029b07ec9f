"""Promises of the command line as a whole: quick help, one line for a user's mistake, a traceback for a bug."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import __version__
from trimtab.cli.errors import CommandError, exit_with

HEAVY = {"torch", "transformers", "grpc", "pydantic", "numpy", "yaml"}


def run_trimtab(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trimtab", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
        check=False,
    )


def test_help_takes_less_than_half_a_second_of_work() -> None:
    run_trimtab("--help")  # writes the byte code
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_trimtab("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "Usage:" in result.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5


def test_importing_the_commands_imports_nothing_heavy() -> None:
    program = f"import sys, trimtab.cli.main; print(sorted(set(sys.modules) & {HEAVY!r}))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_version_is_printed() -> None:
    assert run_trimtab("--version").stdout == f"trimtab {__version__}\n"


@pytest.mark.parametrize("arguments", [("no-such-command",), ("serve", "no-such-service"), ("train", "sft")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run_trimtab(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_an_unknown_config_key_is_one_line_that_names_it(tmp_path: Path) -> None:
    config = tmp_path / "up.yaml"
    config.write_text("generator: {modle: some/model}\n")
    result = run_trimtab("up", "-c", str(config))
    assert result.returncode == 1
    assert result.stderr == f"trimtab: {config}: generator: unknown key 'modle'; did you mean 'model'?\n"


def test_an_unknown_setting_of_serve_is_one_line_that_names_it(tmp_path: Path) -> None:
    config = tmp_path / "generator.yaml"
    config.write_text("model: some/model\nprot: 7101\n")
    result = run_trimtab("serve", "generator", "--config", str(config))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "prot" in result.stderr


def test_a_missing_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    result = run_trimtab("train", "sft", str(tmp_path / "none.yaml"), "--run-id", "first")
    assert result.returncode == 1
    assert result.stderr == f"trimtab: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_debug_shows_the_traceback_of_an_expected_error(tmp_path: Path) -> None:
    result = run_trimtab("train", "sft", str(tmp_path / "none.yaml"), "--run-id", "first", TRIMTAB_DEBUG="1")
    assert "Traceback" in result.stderr


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_DEBUG", raising=False)
    with pytest.raises(ZeroDivisionError):
        exit_with(ZeroDivisionError("a bug"))
    with pytest.raises(SystemExit):
        exit_with(CommandError("two\nlines"))
    assert capsys.readouterr().err == "trimtab: two lines\n"

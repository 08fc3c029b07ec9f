"""`trimtab versions` on a real store, through the real app."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from trimtab.cli.errors import CommandError
from trimtab.cli.versions import app
from trimtab.weights.errors import CorruptVersionError, InvalidNameError, StoreError, VersionNotFoundError
from trimtab.weights.store import Store

MakeFolder = Callable[..., Path]


@pytest.fixture
def filled(local_store: Store, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> Store:
    """run-1/policy@1…4, the store named by the environment."""
    for step in range(1, 5):
        local_store.publish(
            make_folder(seed=step),
            run_id="run-1",
            name="policy",
            step=step,
            metrics={"reward": -step / 3},
            lineage={"data": "stories"},
        )
    monkeypatch.setenv("TRIMTAB_STORE", local_store.url)
    return local_store


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command sets up its process's logs, and this process is not its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def current_step(store: Store) -> int:
    version = store.current_version("run-1", "policy")
    assert version is not None
    return version.step


def test_list_shows_every_version_with_the_current_and_the_pinned(filled: Store) -> None:
    run("pin", "run-1/policy@2", "--reason", "paper")
    rows = {line.split("run-1/policy@")[1][0]: line for line in run("list").splitlines() if "@" in line}
    assert rows.keys() == {"1", "2", "3", "4"}
    assert {step for step, row in rows.items() if "→" in row} == {"4"}
    assert {step for step, row in rows.items() if "*" in row} == {"2"}
    assert "reward=-0.3333" in rows["1"]
    assert "run-1/policy@3" in run("list", "run-1") and "run-1/policy@3" in run("list", "run-1/policy")


def test_show_prints_lineage_metrics_and_files(filled: Store) -> None:
    shown = run("show", "run-1/policy")
    manifest = filled.get("run-1", "policy", 4)
    for expected in ("run-1/policy@4", manifest.version.digest, "stories", "-1.33333", "model.safetensors", "3 files"):
        assert expected in shown
    assert json.loads(run("show", "run-1/policy@2", "--json"))["step"] == 2


def test_verify_reads_all_and_fails_on_damage(filled: Store) -> None:
    assert run("verify").count("ok ") == 4
    weights = filled.fetch(filled.get("run-1", "policy", 3)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    result = CliRunner().invoke(app, ["verify"])
    assert "DAMAGED  run-1/policy@3: the bytes of model.safetensors have changed" in result.output
    assert result.output.count("ok ") == 3
    assert str(result.exception).startswith("1 of 4 versions are damaged")
    assert "1 of 1" in str(CliRunner().invoke(app, ["verify", "run-1/policy@3"]).exception)


def test_rollback_goes_one_back_or_to_the_step_named(filled: Store) -> None:
    assert run("rollback", "run-1/policy") == "current is run-1/policy@3 (was @4)\n"
    assert current_step(filled) == 3
    assert "(was @3)" in run("rollback", "run-1/policy@1")
    result = CliRunner().invoke(app, ["rollback", "run-1/policy"])
    assert "there is no version of run-1/policy before step 1" in str(result.exception)
    assert current_step(filled) == 1


def test_a_rollback_is_noted_in_the_store_or_where_it_is_told_to(filled: Store, tmp_path: Path) -> None:
    run("rollback", "run-1/policy@2")
    run("rollback", "run-1/policy@3", "--audit-file", str(tmp_path / "acts.jsonl"))
    (own,) = (Path(filled.url) / ".audit.jsonl").read_text().splitlines()
    (told,) = (tmp_path / "acts.jsonl").read_text().splitlines()
    for line, step in ((own, 2), (told, 3)):
        act = json.loads(line)
        assert (act["what"], act["outcome"]) == ("versions rollback", "OK") and act["who"].startswith("operator:")
        assert act["target"] == f"run-1/policy@{step} in {filled.url}"
    assert {manifest.version.run_id for manifest in filled.versions()} == {"run-1"}


def test_rollback_to_a_damaged_version_is_refused(filled: Store) -> None:
    (filled.fetch(filled.get("run-1", "policy", 3)) / "config.json").unlink()
    assert isinstance(CliRunner().invoke(app, ["rollback", "run-1/policy"]).exception, CorruptVersionError)
    assert current_step(filled) == 4


def test_prune_removes_what_it_says(filled: Store) -> None:
    run("pin", "run-1/policy@2")
    would = run("prune", "run-1/policy", "--keep-last", "1", "--dry-run")
    assert [line.split()[2] for line in would.splitlines()] == ["run-1/policy@1", "run-1/policy@3"]
    run("unpin", "run-1/policy@2")
    best = ["--best-metric", "reward", "--keep-best", "1"]
    gone = run("prune", "run-1/policy", "--keep-last", "1", *best)
    assert [line.split()[1] for line in gone.splitlines()] == ["run-1/policy@2", "run-1/policy@3"]
    assert [manifest.version.step for manifest in filled.versions()] == [1, 4]
    assert run("prune", "run-1/policy") == "nothing to remove\n"


def test_pull_copies_a_plain_folder(filled: Store, tmp_path: Path) -> None:
    run("pull", "version:run-1/policy@2", str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["show", "nonsense"], InvalidNameError),
        (["show", "run-1/policy@9"], VersionNotFoundError),
        (["show", "other/policy"], VersionNotFoundError),
        (["prune", "../x"], InvalidNameError),
        (["prune", "other/policy"], VersionNotFoundError),
        (["pin", "run-1/policy@9"], VersionNotFoundError),
        (["list", "absent"], CommandError),
        (["pin", "run-1/policy"], CommandError),
        (["list", "--store", "nowhere://x"], StoreError),
    ],
)
def test_wrong_names_raise_errors_that_the_command_line_prints(
    filled: Store, arguments: list[str], error: type[Exception]
) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, error)
    assert "\n" not in str(result.exception)


def test_an_error_is_one_line_on_stderr_and_exit_1(filled: Store) -> None:
    program = (
        "from trimtab.cli.versions import app; from trimtab.cli.errors import exit_with\n"
        "try: app()\nexcept Exception as error: exit_with(error)\n"
    )
    command = [sys.executable, "-c", program, "show", "run-1/policy@77"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("trimtab: no version run-1/policy@77") and result.stderr.count("\n") == 1


def test_the_command_is_light(filled: Store) -> None:
    program = "import sys; from trimtab.cli.versions import app; app(['list'], standalone_mode=False)\n"
    program += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "run-1/policy@4" in result.stdout

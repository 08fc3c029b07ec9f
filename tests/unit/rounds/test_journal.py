"""The journal of a run of rounds: nothing acknowledged is lost or done twice, whenever a kill comes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.rounds import killed_stages
from tests.unit.rounds.killed_stages import NAMES
from trimtab.rounds.journal import FolderBusyError, Journal, JournalError, StageResult, exclusive, is_running
from trimtab.rounds.pipeline import Stage, StageInterrupted, run_stages


def run_in_child(folder: Path, killed_at: int = -1) -> int:
    """How a process ended that goes on with the run in `folder`, minus the signal that killed it."""
    return subprocess.run([sys.executable, killed_stages.__file__, folder, str(killed_at)], timeout=60).returncode


@pytest.mark.parametrize("killed_at", range(2 * len(NAMES)))
def test_a_run_killed_at_any_piece_of_work_goes_on_behind_the_last_completed_stage(tmp_path, killed_at):
    assert run_in_child(tmp_path, killed_at) == -signal.SIGKILL
    before = [event.stage for event in Journal(tmp_path).events if event.event == "done"]
    assert before == list(NAMES[: killed_at // 2])
    assert run_in_child(tmp_path) == 0
    journal = Journal(tmp_path)
    assert [event.stage for event in journal.events if event.event == "done"] == list(NAMES)
    log = (tmp_path / "work.log").read_text().splitlines()
    for name in before:
        assert log.count(f"{name} begins") == log.count(f"{name} ends") == 1
    assert [journal.attempts(name) for name in NAMES] == [2 if i == killed_at // 2 else 1 for i in range(len(NAMES))]


def test_a_journal_cut_at_any_byte_holds_the_events_before_the_cut_and_goes_on(tmp_path):
    assert run_in_child(tmp_path) == 0
    whole = (tmp_path / "journal.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(0, len(whole), 37):
        (tmp_path / "journal.jsonl").write_bytes(whole[:cut])
        journal = Journal(tmp_path)
        assert len(journal.events) == whole[:cut].count(b"\n")
        journal.wait("1/rank", "rankings")
        assert (tmp_path / "journal.jsonl").read_bytes().startswith(b"".join(lines[: len(journal.events) - 1]))
        assert Journal(tmp_path).events == journal.events


def test_a_damaged_line_and_a_changed_file_are_refused_by_name(tmp_path):
    assert run_in_child(tmp_path) == 0
    (tmp_path / "1-sample.txt").write_text("something else")
    with pytest.raises(JournalError, match=r"1-sample\.txt has changed since 1/sample was completed"):
        Journal(tmp_path).verify_files()
    lines = (tmp_path / "journal.jsonl").read_text().splitlines(True)
    (tmp_path / "journal.jsonl").write_text("".join([lines[0], "{}\n", *lines[2:]]))
    with pytest.raises(JournalError, match="line 2 is not an event"):
        Journal(tmp_path)


def test_two_processes_never_work_in_one_folder(tmp_path):
    assert not is_running(tmp_path)
    with exclusive(tmp_path):
        assert is_running(tmp_path)
        with pytest.raises(FolderBusyError, match="another"), exclusive(tmp_path):
            pass
    assert not is_running(tmp_path)


def test_an_interrupted_stage_is_tried_again_and_a_failed_one_is_recorded(tmp_path):
    journal = Journal(tmp_path)

    def run(attempt: int) -> StageResult:
        if attempt < 3:
            raise StageInterrupted("the trainer was gone")
        return StageResult()

    run_stages([Stage("1/ppo", run)], journal, lambda text: None)
    assert journal.attempts("1/ppo") == 3 and journal.done("1/ppo") is not None

    def fail(attempt: int) -> StageResult:
        raise ValueError("the loss is\nnan")

    with pytest.raises(ValueError, match="nan"):
        run_stages([Stage("2/ppo", fail)], journal, lambda text: None)
    assert journal.events[-1].event == "failed" and journal.events[-1].detail == "the loss is nan"
    assert journal.attempts("2/ppo") == 1

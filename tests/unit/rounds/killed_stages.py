"""Run by test_journal, `killed_stages.py FOLDER N`: goes on with the toy run in FOLDER and kills itself at its N-th
piece of work, counted from 0. Not a fork of the test's process, whose threads a fork may wait for without end.
"""

import os
import signal
import sys
from pathlib import Path

from trimtab.rounds.journal import Journal, StageResult
from trimtab.rounds.pipeline import Stage, run_stages

NAMES = ("0/sft", "1/sample", "1/rank")


def toy_stages(folder: Path, killed_at: int) -> list[Stage]:
    """Stages that write down each piece of work in FOLDER/work.log."""
    pieces = iter(range(1000))

    def piece(text: str) -> None:
        if next(pieces) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with (folder / "work.log").open("a") as log:
            log.write(text + "\n")

    def stage(name: str) -> Stage:
        def run(attempt: int) -> StageResult:
            piece(f"{name} begins")
            file = folder / f"{name.replace('/', '-')}.txt"
            file.write_text(f"{name} attempt {attempt}")
            piece(f"{name} ends")
            return StageResult(outputs={"attempt": str(attempt)}, files=(file,))

        return Stage(name, run)

    return [stage(name) for name in NAMES]


def main(folder: Path, killed_at: int) -> None:
    journal = Journal(folder)
    if journal.begun is None:
        journal.begin({}, {})
    journal.verify_files()
    run_stages(toy_stages(folder, killed_at), journal, lambda text: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

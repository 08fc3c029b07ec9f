"""Run by test_crash_safety: publishes step 2 in a child that kills itself, with SIGKILL, before its k-th system call
that touches files, for k = 1, 2, … until a child gets through. Prints one JSON line per child with what is left.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from trimtab.weights.errors import StoreError
from trimtab.weights.store import open_store

TOUCHES_FILES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock", "os.scandir", "os.listdir"}


def publish_and_die(root: Path, folder: Path, calls_left: int) -> None:
    def count(event: str, _: object) -> None:
        nonlocal calls_left
        if event in TOUCHES_FILES:
            calls_left -= 1
            if calls_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    store = open_store(str(root))
    sys.addaudithook(count)
    store.publish(folder, run_id="r", name="policy", step=2)
    os._exit(0)


def survey(root: Path, folder: Path) -> dict[str, object]:
    """What a reader finds, and whether the next publisher can finish the job."""
    store = open_store(str(root))
    torn = []
    for manifest in store.versions():
        try:
            store.verify(manifest)
        except StoreError as error:
            torn.append(str(error))
    steps = [manifest.version.step for manifest in store.versions()]
    current = store.current("r", "policy")
    store.publish(folder, run_id="r", name="policy", step=2)
    after = store.current("r", "policy")
    # A staging folder swept by the next publisher's own start is gone now; one more starts a sweep in every case.
    store.publish(folder, run_id="r", name="policy", step=3)
    return {
        "steps": steps,
        "current": current.version.step if current else None,
        "torn": torn,
        "current_after": after.version.step if after else None,
        "left": sorted(path.name for path in (root / "r" / "policy" / ".staging").iterdir()),
        "hidden": sorted(path.name for path in (root / "r" / "policy").glob(".current*")),
    }


def main(base: Path, first: Path, second: Path) -> None:
    assert fcntl  # imported before the fork, so that its own file reads are not counted
    open_store(str(base / "template")).publish(first, run_id="r", name="policy", step=1)
    for k in range(1, 1000):
        root = base / f"store-{k}"
        shutil.copytree(base / "template", root)
        child = os.fork()
        if child == 0:
            publish_and_die(root, second, k)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"k": k, "killed": killed, "status": status, **survey(root, second)}), flush=True)
        if not killed:
            return


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

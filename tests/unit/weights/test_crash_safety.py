"""A publish that is killed, or runs out of space, changes nothing that a reader can see."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trimtab.weights.errors import StoreFullError
from trimtab.weights.store import Store, open_store

MakeFolder = Callable[..., Path]
SCRIPT = Path(__file__).with_name("publish_killed.py")


def visible_files(root: Path) -> dict[str, bytes]:
    """Everything a reader of a local store can come across."""
    paths = [path for path in root.rglob("*") if path.is_file() and ".staging" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def test_kill_9_at_any_moment_of_a_publish_leaves_whole_versions_only(make_folder: MakeFolder, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(make_folder(seed=1)), str(make_folder(seed=2))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) > 20
    assert [result["killed"] for result in results] == [True] * (len(results) - 1) + [False]
    for result in results:
        assert result["torn"] == []
        assert (result["steps"], result["current"]) in (([1], 1), ([1, 2], 1), ([1, 2], 2)), result
        assert result["current_after"] == 2
        assert result["left"] == [".lock"]
    moments = {(len(result["steps"]), result["current"]) for result in results}
    assert moments == {(1, 1), (2, 1), (2, 2)}, "killed before the version, between it and the pointer, and after"


def test_kill_9_of_a_busy_publisher_leaves_whole_versions_only(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(kib=4096)
    program = (
        "import sys; from pathlib import Path; from trimtab.weights.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "for step in range(1, 10**6): store.publish(Path(sys.argv[2]), run_id='r', name='policy', step=step)\n"
    )
    store = open_store(str(tmp_path / "store"))
    for kill in range(1, 4):
        already = len(store.versions())
        with subprocess.Popen([sys.executable, "-c", program, store.url, str(folder)]) as publisher:
            deadline = time.monotonic() + 60
            while len(store.versions()) < already + 2 and time.monotonic() < deadline:
                time.sleep(0.001 * kill)
            publisher.kill()
        assert len(store.versions()) >= already + 2
        for manifest in store.versions():
            store.verify(manifest)
        current = store.current("r", "policy")
        assert current is not None and store.versions()[-1].version.step - current.version.step in (0, 1)


def test_a_full_disk_leaves_the_version_before_current(tiny_disk: Path, make_folder: MakeFolder) -> None:
    store = open_store(str(tiny_disk / "store"))
    first = store.publish(make_folder(seed=1, kib=16), run_id="r", name="policy", step=1)
    second = make_folder(seed=2, kib=40)
    before = visible_files(tiny_disk / "store")
    outcomes = []
    for spare_kib in range(0, 100, 4):
        filler = tiny_disk / "filler"
        free = os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize
        filler.write_bytes(b"\0" * max(0, free - spare_kib * 1024))
        try:
            published = store.publish(second, run_id="r", name="policy", step=2)
        except StoreFullError as error:
            outcomes.append("full")
            assert "no space left while publishing to" in str(error)
            assert visible_files(tiny_disk / "store") == before
            assert store.current("r", "policy") == first
        else:
            outcomes.append("published")
            assert store.current("r", "policy") == store.verify(published)
            break
        finally:
            filler.unlink()
    assert outcomes[0] == "full" and outcomes[-1] == "published" and len(outcomes) > 5


def test_a_file_size_limit_is_met_before_anything_changes(make_folder: MakeFolder, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    first = store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    before = visible_files(tmp_path / "store")
    program = (
        "import resource, sys; from pathlib import Path; from trimtab.weights.errors import StoreFullError\n"
        "from trimtab.weights.store import open_store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: open_store(sys.argv[1]).publish(Path(sys.argv[2]), run_id='r', name='policy', step=2)\n"
        "except StoreFullError as error: print(error); sys.exit(3)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, store.url, str(make_folder(seed=2, kib=256))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (3, "")
    assert run.stdout.startswith("no space left while publishing to")
    assert visible_files(tmp_path / "store") == before
    assert store.current("r", "policy") == first
    assert [path.name for path in (tmp_path / "store/r/policy/.staging").iterdir()] == [".lock"]


def test_readers_beside_a_publisher_see_whole_versions_only(
    local_store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folders = [make_folder(seed=seed, kib=64) for seed in range(12)]
    local_store.publish(folders[0], run_id="r", name="policy", step=0)
    done = threading.Event()
    seen: list[int] = []
    failures: list[Exception] = []

    def read() -> None:
        reader = open_store(local_store.url)
        try:
            while not done.is_set():
                current = reader.current("r", "policy")
                assert current is not None
                reader.fetch(current)
                seen.append(current.version.step)
        except Exception as error:  # reported by the test's own thread
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step, folder in enumerate(folders[1:], start=1):
        local_store.publish(folder, run_id="r", name="policy", step=step)
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(set(seen)) > 1

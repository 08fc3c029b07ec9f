"""Whatever befalls a delta, the answer is a typed error or the right bytes, and what is served stays as it is."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.weights.delta_folders import changed_bits, files_of, random_bits, write_folder
from trimtab.weights.delta_file import DELTA_FILE
from trimtab.weights.delta_publish import Deltas
from trimtab.weights.digests import digest_file
from trimtab.weights.errors import (
    CorruptVersionError,
    ParentMissingError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    WrongParentError,
)
from trimtab.weights.object_files import ObjectFiles
from trimtab.weights.store import Store, open_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Four steps of one model, 2 % of their elements changed from each to the next."""
    rng = np.random.default_rng(11)
    bits = random_bits(rng, "BF16", (200, 64))
    made = []
    for step in range(4):
        made.append(write_folder(tmp_path / f"step-{step}", {"model.safetensors": {"w": bits}}))
        bits = changed_bits(rng, bits, 0.02)
    return made


def publish(store: Store, folders: list[Path], steps: range) -> None:
    for step in steps:
        store.publish(folders[step], run_id="r", name="p", step=step, deltas=Deltas())


def version_path(store: Store, step: int) -> Path:
    return Path(store.url) / "r" / "p" / f"step-{step:012d}"


def test_a_flipped_bit_anywhere_in_a_delta_is_found(local_store: Store, folders: list[Path], tmp_path: Path) -> None:
    publish(local_store, folders, range(3))
    path = version_path(local_store, 1) / DELTA_FILE
    whole = path.read_bytes()
    manifest_path = version_path(local_store, 1) / "manifest.json"
    manifest = manifest_path.read_bytes()
    for bit in random.Random(5).sample(range(len(whole) * 8), 60):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptVersionError, match=r"the bytes of weights\.delta have changed"):
            local_store.fetch(local_store.get("r", "p", 2), tmp_path / "cold")
        # even where the manifest was made to agree with the damage
        forged = manifest.replace(digest_of(whole, tmp_path), digest_file(path).encode())
        manifest_path.write_bytes(forged)
        with pytest.raises(CorruptVersionError):
            local_store.fetch(local_store.get("r", "p", 1), tmp_path / "cold")
        with (
            pytest.raises(CorruptVersionError),
            local_store.changes(local_store.get("r", "p", 0).version, local_store.get("r", "p", 1)) as changes,
        ):
            assert changes is not None
            bits = np.frombuffer((folders[0] / "model.safetensors").read_bytes()[-200 * 64 * 2 :], "<u2")
            changes.staged({"w": bits}, local_store.get("r", "p", 0).version.digest)
        manifest_path.write_bytes(manifest)
    path.write_bytes(whole)
    assert files_of(local_store.fetch(local_store.get("r", "p", 2), tmp_path / "cold")) == files_of(folders[2])


def digest_of(data: bytes, scratch: Path) -> bytes:
    (scratch / "whole").write_bytes(data)
    return digest_file(scratch / "whole").encode()


def test_a_delta_that_comes_before_its_parent_waits_for_it(
    local_store: Store, folders: list[Path], tmp_path: Path
) -> None:
    publish(local_store, folders, range(4))
    hidden = tmp_path / "not yet here"
    version_path(local_store, 2).rename(hidden)
    with pytest.raises(ParentMissingError, match="r/p@3 is a delta on r/p@2, which is not in"):
        local_store.fetch(local_store.get("r", "p", 3), tmp_path / "cold")
    with (
        pytest.raises(ParentMissingError),
        local_store.changes(local_store.get("r", "p", 1).version, local_store.get("r", "p", 3)),
    ):
        pass
    assert files_of(local_store.fetch(local_store.get("r", "p", 1), tmp_path / "cold")) == files_of(folders[1])
    hidden.rename(version_path(local_store, 2))
    assert files_of(local_store.fetch(local_store.get("r", "p", 3), tmp_path / "cold")) == files_of(folders[3])


def test_another_parent_than_the_deltas_is_refused(local_store: Store, folders: list[Path], tmp_path: Path) -> None:
    publish(local_store, folders, range(3))
    other = open_store(str(tmp_path / "other"))
    other.publish(folders[3], run_id="r", name="p", step=1)
    shutil.rmtree(version_path(local_store, 1))
    shutil.copytree(version_path(other, 1), version_path(local_store, 1))
    with pytest.raises(WrongParentError, match="publish a full version"):
        local_store.fetch(local_store.get("r", "p", 2), tmp_path / "cold")


def test_changes_refuse_weights_of_another_version(local_store: Store, folders: list[Path]) -> None:
    publish(local_store, folders, range(3))
    versions = [local_store.get("r", "p", step).version for step in range(3)]
    served = np.frombuffer((folders[0] / "model.safetensors").read_bytes()[-200 * 64 * 2 :], "<u2")
    before = served.tobytes()
    with local_store.changes(versions[1], versions[2]) as changes:
        assert changes is not None
        with pytest.raises(WrongParentError):
            changes.staged({"w": served}, versions[0].digest)
        with pytest.raises(CorruptVersionError):  # it says it is version 1, and is version 0
            changes.staged({"w": served}, versions[1].digest)
        with pytest.raises(WrongParentError):
            changes.staged({}, versions[1].digest)
    assert served.tobytes() == before
    with local_store.changes(versions[2], versions[1]) as backward:
        assert backward is None


@pytest.mark.parametrize("name", [DELTA_FILE, "manifest.json"])
def test_a_missing_file_of_a_delta_is_named(local_store: Store, folders: list[Path], tmp_path: Path, name: str) -> None:
    publish(local_store, folders, range(3))
    (version_path(local_store, 1) / name).unlink()
    with pytest.raises(StoreError, match=r"weights\.delta is missing|which is not in"):
        local_store.fetch(local_store.get("r", "p", 2), tmp_path / "cold")


def test_a_store_that_fails_at_any_write_keeps_the_version_before(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0
    for k in range(1, 50):
        store = open_store(f"memory://failing-{os.getpid()}-{k}")
        publish(store, folders, range(2))
        backend = store._backend
        assert isinstance(backend, ObjectFiles)
        left = k

        def failing(original: Callable[..., object]) -> Callable[..., object]:
            def write(*arguments: object, **named: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    raise OSError(errno.EIO, "the store does not answer")
                return original(*arguments, **named)

            return write

        with monkeypatch.context() as patch:
            for name in ("put_file", "pipe_file", "makedirs"):
                patch.setattr(backend.filesystem, name, failing(getattr(backend.filesystem, name)))
            try:
                publish(store, folders, range(2, 3))
            except StoreUnavailableError:
                failures += 1
            else:
                break
        current = store.current("r", "p")
        assert current is not None and current.version.step == 1
        assert files_of(store.fetch(current, tmp_path / f"cold-{k}")) == files_of(folders[1])
        publish(store, folders, range(2, 4))
        last = store.get("r", "p", 3)
        assert files_of(store.fetch(last, tmp_path / f"cold-{k}")) == files_of(folders[3])
    assert failures >= 3


def test_a_full_disk_of_store_or_cache_is_a_typed_error(
    tiny_disk: Path, tmp_path: Path, folders: list[Path], cache: Path
) -> None:
    store = open_store(str(tiny_disk / "store"))
    publish(store, folders, range(2))
    served = store.fetch(store.get("r", "p", 1))
    filler = tiny_disk / "filler"
    filler.write_bytes(b"\0" * (os.statvfs(tiny_disk).f_bavail * os.statvfs(tiny_disk).f_frsize))
    with pytest.raises(StoreFullError):
        publish(store, folders, range(2, 3))
    with pytest.raises(StoreFullError):
        store.fetch(store.get("r", "p", 1), tiny_disk / "cache")
    assert store.current("r", "p") == store.get("r", "p", 1)
    assert files_of(served) == files_of(folders[1])
    filler.unlink()
    publish(store, folders, range(2, 3))
    assert files_of(store.fetch(store.get("r", "p", 2))) == files_of(folders[2])


def test_deltas_travel_over_s3(s3_store: Store, folders: list[Path], tmp_path: Path) -> None:
    lease = s3_store.acquire_lease("r", "trainer", ttl_s=60)
    for step, folder in enumerate(folders):
        s3_store.publish(folder, run_id="r", name="p", step=step, lease=lease, deltas=Deltas())
    reader = open_store(s3_store.url)
    assert [manifest.kind for manifest in reader.versions()] == ["full", "delta", "delta", "delta"]
    for step in (3, 1):
        reader.pull(reader.get("r", "p", step), tmp_path / f"pulled-{step}")
        assert files_of(tmp_path / f"pulled-{step}") == files_of(folders[step])
    with reader.changes(reader.get("r", "p", 1).version, reader.get("r", "p", 3)) as changes:
        assert changes is not None and changes.changed_elements > 0

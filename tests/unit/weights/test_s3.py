"""The store on S3, spoken to a real server; runs where s3fs and moto's server are installed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.weights.errors import StoreUnavailableError, VersionConflictError
from trimtab.weights.object_files import ObjectFiles
from trimtab.weights.store import Store, open_store

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

MakeFolder = Callable[..., Path]


def test_the_life_of_versions_on_s3(s3_store: Store, make_folder: MakeFolder, tmp_path: Path) -> None:
    other = open_store(s3_store.url)
    assert other.versions() == [] and other.current("r", "policy") is None
    for step in range(4):
        published = s3_store.publish(make_folder(seed=step), run_id="r", name="policy", step=step)
        assert other.current("r", "policy") == published
    folder = other.fetch(other.get("r", "policy", 3), tmp_path / "cache")
    assert (folder / "config.json").read_text() == '{"seed": 3}'
    other.set_current("r", "policy", 1)
    other.pin("r", "policy", 0)
    gone = s3_store.prune("r", "policy", keep_last=1)
    assert [manifest.version.step for manifest in gone] == [2]
    for manifest in other.versions():
        other.verify(manifest)
    with pytest.raises(VersionConflictError):
        other.publish(make_folder(seed=9), run_id="r", name="policy", step=2)


def test_the_slower_of_two_publishers_is_refused_and_leaves_nothing(
    s3_store: Store, local_store: Store, make_folder: MakeFolder
) -> None:
    slow = make_folder(seed=1)
    manifest = local_store.publish(slow, run_id="r", name="policy", step=1)
    backend = s3_store._backend
    assert isinstance(backend, ObjectFiles)
    with backend.stage("r/policy", slow, manifest) as staged:
        winner = s3_store.publish(make_folder(seed=2), run_id="r", name="policy", step=1)
        with pytest.raises(FileExistsError):
            staged.commit(None)
    assert s3_store.verify(winner) == s3_store.current("r", "policy") == winner
    objects = backend.filesystem.find(backend.path("r/policy/step-000000000001"))
    assert {path.split("/")[5] for path in objects} == {"manifest.json", winner.files_folder}


def test_a_server_that_is_gone_is_unavailable(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreUnavailableError, match="while reading s3://"):
        open_store(s3_store.url).current("r", "policy")

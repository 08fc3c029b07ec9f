import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.weights.errors import (
    InvalidNameError,
    RefusedFileError,
    StepOrderError,
    StoreError,
    StoreUnavailableError,
    VersionConflictError,
    VersionNotFoundError,
)
from trimtab.weights.manifest import Manifest
from trimtab.weights.store import Store, open_store

MakeFolder = Callable[..., Path]


def test_a_published_version_is_current_and_comes_back_whole(
    store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(seed=1)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "notes.txt").write_text("nested files travel too")
    manifest = store.publish(
        folder, run_id="run-1", name="policy", step=7, lineage={"data": "d1"}, metrics={"reward": 1.5}, parent="base"
    )
    assert store.current("run-1", "policy") == manifest == store.get("run-1", "policy", 7)
    assert str(manifest.version) == "run-1/policy@7"
    assert (manifest.lineage, manifest.metrics, manifest.parent) == ({"data": "d1"}, {"reward": 1.5}, "base")
    assert (manifest.kind, manifest.format) == ("full", 1)
    fetched = store.fetch(manifest.version, tmp_path / "cache")
    for entry in manifest.files:
        assert (fetched / entry.name).read_bytes() == (folder / entry.name).read_bytes()
    assert [entry.name for entry in manifest.files] == [
        "adapter/notes.txt",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_an_empty_store_has_nothing_and_is_not_created_by_reading(local_store: Store) -> None:
    assert local_store.versions() == []
    assert local_store.current("r", "policy") is None
    with pytest.raises(VersionNotFoundError, match="nothing was published under that name"):
        local_store.get("r", "policy", 1)
    assert not Path(local_store.url).exists()


def test_publishing_equal_content_again_changes_nothing(store: Store, make_folder: MakeFolder) -> None:
    first = store.publish(make_folder(seed=1), run_id="r", name="policy", step=3, metrics={"reward": 1.0})
    again = store.publish(make_folder(seed=1), run_id="r", name="policy", step=3, metrics={"reward": 2.0})
    assert again == first
    assert store.versions() == [first]


def test_other_content_at_a_taken_step_is_refused(store: Store, make_folder: MakeFolder) -> None:
    first = store.publish(make_folder(seed=1), run_id="r", name="policy", step=3)
    with pytest.raises(VersionConflictError, match="r/policy@3 was published with digest blake3:"):
        store.publish(make_folder(seed=2), run_id="r", name="policy", step=3)
    assert store.versions() == [first]


def test_steps_only_grow_within_one_model(store: Store, make_folder: MakeFolder) -> None:
    store.publish(make_folder(seed=1), run_id="r", name="policy", step=10)
    with pytest.raises(StepOrderError, match="publish at 11 or later"):
        store.publish(make_folder(seed=2), run_id="r", name="policy", step=9)
    store.publish(make_folder(seed=2), run_id="r", name="reward", step=9)
    store.publish(make_folder(seed=2), run_id="other", name="policy", step=9)
    assert [str(m.version) for m in store.versions()] == ["other/policy@9", "r/policy@10", "r/reward@9"]
    assert [str(m.version) for m in store.versions("r")] == ["r/policy@10", "r/reward@9"]
    assert [str(m.version) for m in store.versions(name="policy")] == ["other/policy@9", "r/policy@10"]


def test_versions_are_sorted_by_step_as_numbers(store: Store, make_folder: MakeFolder) -> None:
    for step in (0, 9, 10, 100):
        store.publish(make_folder(seed=step), run_id="r", name="policy", step=step)
    assert [m.version.step for m in store.versions("r", "policy")] == [0, 9, 10, 100]


def test_a_version_can_be_published_without_becoming_current(store: Store, make_folder: MakeFolder) -> None:
    store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    store.publish(make_folder(seed=2), run_id="r", name="policy", step=2, set_current=False)
    current = store.current("r", "policy")
    assert current is not None and current.version.step == 1
    assert store.set_current("r", "policy", 2) == store.current("r", "policy")


def test_a_replayed_publish_does_not_undo_a_roll_back(store: Store, make_folder: MakeFolder) -> None:
    for step in (1, 2):
        store.publish(make_folder(seed=step), run_id="r", name="policy", step=step)
    store.set_current("r", "policy", 1)
    store.publish(make_folder(seed=2), run_id="r", name="policy", step=2)
    assert store.current_version("r", "policy") == store.get("r", "policy", 1).version
    newest = store.publish(make_folder(seed=3), run_id="r", name="policy", step=3)
    assert store.current("r", "policy") == newest


def test_pointer_cannot_move_to_what_is_not_there(store: Store, make_folder: MakeFolder) -> None:
    with pytest.raises(VersionNotFoundError, match="nothing was published as r/policy"):
        store.set_current("r", "policy", 1)
    store.publish(make_folder(), run_id="r", name="policy", step=1)
    with pytest.raises(VersionNotFoundError, match=r"no version r/policy@2 in .*its steps are 1"):
        store.set_current("r", "policy", 2)
    current = store.current("r", "policy")
    assert current is not None and current.version.step == 1


@pytest.mark.parametrize("file", ["pytorch_model.bin", "optimizer.PT", "sub/x.pkl", "a.ckpt", "rng.npz", "model.pth"])
def test_pickles_are_never_published(store: Store, make_folder: MakeFolder, file: str) -> None:
    folder = make_folder()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"x")
    with pytest.raises(RefusedFileError, match=f"{file} is not safetensors"):
        store.publish(folder, run_id="r", name="policy", step=1)
    assert store.versions() == []


@pytest.mark.parametrize("start", [b"\x80\x04\x95", b"PK\x03\x04"], ids=["pickle", "torch zip"])
def test_a_pickle_under_an_innocent_name_is_refused(store: Store, make_folder: MakeFolder, start: bytes) -> None:
    folder = make_folder()
    (folder / "weights.dat").write_bytes(start + b"rest")
    with pytest.raises(RefusedFileError, match=r"weights\.dat is not safetensors"):
        store.publish(folder, run_id="r", name="policy", step=1)


def test_a_folder_without_weights_or_with_broken_ones_is_refused(store: Store, make_folder: MakeFolder) -> None:
    folder = make_folder()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(RefusedFileError, match=r"model\.safetensors is broken: its tensors end at byte"):
        store.publish(folder, run_id="r", name="policy", step=1)
    weights.unlink()
    with pytest.raises(RefusedFileError, match="there are no weights to publish"):
        store.publish(folder, run_id="r", name="policy", step=1)
    with pytest.raises(RefusedFileError, match="is not a folder"):
        store.publish(folder / "absent", run_id="r", name="policy", step=1)


def test_links_to_files_are_followed_and_links_to_folders_refused(
    store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder(seed=5)
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    manifest = store.publish(folder, run_id="r", name="policy", step=1)
    fetched = store.fetch(manifest, tmp_path / "cache") / "model.safetensors"
    assert not fetched.is_symlink() and fetched.read_bytes() == blob.read_bytes()
    (folder / "loop").symlink_to(tmp_path)
    with pytest.raises(RefusedFileError, match="loop is neither a file nor a folder of its own"):
        store.publish(folder, run_id="r", name="policy", step=2)


def test_dot_files_and_an_old_manifest_are_left_out(store: Store, make_folder: MakeFolder) -> None:
    plain = store.publish(make_folder(seed=1), run_id="a", name="policy", step=1)
    folder = make_folder(seed=1)
    (folder / ".gitattributes").write_text("x")
    (folder / "manifest.json").write_text("{}")
    assert store.publish(folder, run_id="b", name="policy", step=1).files == plain.files


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "../x", "a..b", ".hidden", "a b", "a\n", "ä", "/etc", "a\0", "x" * 129, "pins"]
)
def test_names_cannot_lead_out_of_the_store(store: Store, make_folder: MakeFolder, tmp_path: Path, bad: str) -> None:
    folder = make_folder()
    for run_id, name in ((bad, "policy"), ("run", bad)):
        with pytest.raises(InvalidNameError, match="is not allowed"):
            store.publish(folder, run_id=run_id, name=name, step=1)
        with pytest.raises(InvalidNameError, match="is not allowed"):
            store.get(run_id, name, 1)
        with pytest.raises(InvalidNameError, match="is not allowed"):
            store.current(run_id, name)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("step", [-1, 10**12])
def test_steps_have_bounds(store: Store, make_folder: MakeFolder, step: int) -> None:
    with pytest.raises(InvalidNameError, match=f"step {step} is not allowed"):
        store.publish(make_folder(), run_id="r", name="policy", step=step)


def test_metrics_that_are_not_finite_survive(store: Store, make_folder: MakeFolder) -> None:
    metrics = {"nan": float("nan"), "inf": float("inf"), "one": 1.0}
    store.publish(make_folder(), run_id="r", name="policy", step=1, metrics=metrics)
    read = store.get("r", "policy", 1).metrics
    assert read["nan"] != read["nan"] and read["inf"] == float("inf") and read["one"] == 1.0


def test_manifest_on_disk_is_plain_json(local_store: Store, make_folder: MakeFolder) -> None:
    manifest = local_store.publish(make_folder(), run_id="r", name="policy", step=1)
    path = local_store.fetch(manifest) / "manifest.json"
    record = json.loads(path.read_text())
    assert (record["run_id"], record["step"], record["digest"]) == ("r", 1, manifest.version.digest)
    assert Manifest.from_json(path.read_bytes(), "here") == manifest


def test_publishers_at_once_agree_on_one_content(local_store: Store, make_folder: MakeFolder) -> None:
    folders = [make_folder(seed=seed) for seed in (1, 1, 2, 2)]
    results: list[Manifest | StoreError] = []
    barrier = threading.Barrier(len(folders))

    def publish(folder: Path) -> None:
        barrier.wait()
        try:
            results.append(open_store(local_store.url).publish(folder, run_id="r", name="policy", step=1))
        except StoreError as error:
            results.append(error)

    threads = [threading.Thread(target=publish, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    published = [result for result in results if isinstance(result, Manifest)]
    refused = [result for result in results if isinstance(result, VersionConflictError)]
    assert len(published) == len(refused) == 2
    assert published[0] == published[1] == local_store.verify(published[0])


def test_unknown_storage_and_denied_access_are_named(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match="cannot open the store nowhere://x"):
        open_store("nowhere://x")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreUnavailableError, match=f"publishing to {tmp_path}/file"):
        open_store(str(tmp_path / "file")).publish(make_folder(), run_id="r", name="policy", step=1)


def test_the_source_folder_is_left_as_it_was(store: Store, make_folder: MakeFolder) -> None:
    folder = make_folder()
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    store.publish(folder, run_id="r", name="policy", step=1)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert os.access(folder / "config.json", os.W_OK)

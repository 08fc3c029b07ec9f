import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from trimtab.weights.errors import CorruptVersionError, InvalidNameError, VersionConflictError, VersionNotFoundError
from trimtab.weights.fetch import KEPT_VERSIONS
from trimtab.weights.object_files import ObjectFiles
from trimtab.weights.store import Store
from trimtab_client import ModelVersion

MakeFolder = Callable[..., Path]


@pytest.fixture
def published(local_store: Store, make_folder: MakeFolder) -> Path:
    """The folder of one published version, r/policy@1."""
    return local_store.fetch(local_store.publish(make_folder(seed=1), run_id="r", name="policy", step=1))


@pytest.fixture
def remote_store(tmp_path: Path) -> Store:
    """A store of the object kind whose objects are files, so that tests can damage them."""
    root = tmp_path / "bucket"
    return Store(ObjectFiles(LocalFileSystem(auto_mkdir=True), str(root), f"files:{root}"))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_local_version_is_used_where_it_lies(local_store: Store, published: Path) -> None:
    assert published == Path(local_store.url) / "r/policy/step-000000000001"


DAMAGE = {
    "one bit of the weights": (
        lambda folder: flip_last_byte(folder / "model.safetensors"),
        r"the bytes of model\.safetensors have changed",
    ),
    "one bit of the config": (lambda folder: flip_last_byte(folder / "config.json"), r"the bytes of config\.json"),
    "a shorter file": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        r"model\.safetensors has 5 bytes instead of",
    ),
    "a missing file": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "a foreign pickle": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        r"pytorch_model\.bin lies in its folder but is not part",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_version_is_never_returned(
    local_store: Store, published: Path, damage: tuple[Callable[[Path], object], str]
) -> None:
    apply, message = damage
    apply(published)
    for read in (local_store.fetch, local_store.verify):
        with pytest.raises(CorruptVersionError, match=f"r/policy@1: {message}"):
            read(local_store.get("r", "policy", 1))


def test_a_manifest_rewritten_to_fit_other_files_is_caught_by_the_content_digest(
    local_store: Store, published: Path, make_folder: MakeFolder
) -> None:
    other = local_store.fetch(local_store.publish(make_folder(seed=2), run_id="x", name="policy", step=1))
    record = json.loads((published / "manifest.json").read_text())
    record["files"] = json.loads((other / "manifest.json").read_text())["files"]
    (published / "manifest.json").write_text(json.dumps(record))
    for entry in record["files"]:
        (published / entry["name"]).write_bytes((other / entry["name"]).read_bytes())
    with pytest.raises(CorruptVersionError, match="its content has digest"):
        local_store.fetch(local_store.get("r", "policy", 1))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b", "", "a//b", "manifest.json", "a\\b"])
def test_a_manifest_that_names_files_outside_its_folder_is_refused(
    local_store: Store, published: Path, name: str
) -> None:
    record = json.loads((published / "manifest.json").read_text())
    record["files"][0]["name"] = name
    (published / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CorruptVersionError, match="is not a safe manifest"):
        local_store.get("r", "policy", 1)


def test_a_manifest_that_lists_a_pickle_is_never_fetched(
    remote_store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    manifest = remote_store.publish(make_folder(), run_id="r", name="policy", step=1)
    path = tmp_path / "bucket/r/policy/step-000000000001/manifest.json"
    record = json.loads(path.read_text())
    record["files"][0]["name"] = "pytorch_model.bin"
    path.write_text(json.dumps(record))
    with pytest.raises(CorruptVersionError, match=r"lists pytorch_model\.bin, and only safetensors"):
        remote_store.fetch(manifest.version, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "upgrade trimtab"),
        ({"digest": "sha256:0"}, "digest: String should match"),
        ({"files": []}, "files: List should have at least 1 item"),
        ({"kind": "half"}, "kind: Input should be 'full', 'delta' or 'adapter'"),
        ({"step": 2}, "is the manifest of r/policy@2"),
        ({"run_id": "../x"}, "is not a safe manifest"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(
    local_store: Store, published: Path, change: dict[str, object], message: str
) -> None:
    path = published / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptVersionError, match=message):
        local_store.get("r", "policy", 1)
    path.write_text("{")
    with pytest.raises(CorruptVersionError, match=r"manifest\.json is not a manifest"):
        local_store.versions()


def test_the_digest_asked_for_is_the_digest_given(store: Store, make_folder: MakeFolder, tmp_path: Path) -> None:
    version = store.publish(make_folder(), run_id="r", name="policy", step=1).version
    any_digest = ModelVersion(run_id="r", name="policy", step=1, digest="")
    assert store.fetch(any_digest, tmp_path) == store.fetch(version, tmp_path)
    other = ModelVersion(run_id="r", name="policy", step=1, digest="blake3:" + "0" * 64)
    with pytest.raises(VersionConflictError, match="r/policy@1 has digest"):
        store.fetch(other, tmp_path)
    with pytest.raises(VersionNotFoundError):
        store.fetch(ModelVersion(run_id="r", name="policy", step=2, digest=""), tmp_path)


def test_a_cached_copy_is_reused_and_a_damaged_one_downloaded_again(
    remote_store: Store, make_folder: MakeFolder, tmp_path: Path
) -> None:
    manifest = remote_store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    copy = remote_store.fetch(manifest, tmp_path / "cache")
    written = (copy / "model.safetensors").stat().st_mtime_ns
    assert remote_store.fetch(manifest, tmp_path / "cache") == copy
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    good = (copy / "model.safetensors").read_bytes()
    flip_last_byte(copy / "model.safetensors")
    assert remote_store.fetch(manifest, tmp_path / "cache") == copy
    assert (copy / "model.safetensors").read_bytes() == good
    assert {path.name for path in copy.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_damaged_object_never_reaches_the_cache(remote_store: Store, make_folder: MakeFolder, tmp_path: Path) -> None:
    manifest = remote_store.publish(make_folder(seed=1), run_id="r", name="policy", step=1)
    objects = tmp_path / "bucket/r/policy/step-000000000001" / manifest.files_folder
    flip_last_byte(objects / "model.safetensors")
    for read in (lambda: remote_store.fetch(manifest, tmp_path / "cache"), lambda: remote_store.verify(manifest)):
        with pytest.raises(CorruptVersionError, match=r"the bytes of model\.safetensors have changed"):
            read()
    (objects / "model.safetensors").unlink()
    with pytest.raises(CorruptVersionError, match=r"model\.safetensors is missing"):
        remote_store.fetch(manifest, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


def test_the_cache_keeps_the_versions_used_last(remote_store: Store, make_folder: MakeFolder, tmp_path: Path) -> None:
    manifests = [
        remote_store.publish(make_folder(seed=step), run_id="r", name="policy", step=step)
        for step in range(KEPT_VERSIONS + 1)
    ]
    for manifest in manifests[:-1]:
        remote_store.fetch(manifest, tmp_path)
    remote_store.fetch(manifests[0], tmp_path)
    remote_store.fetch(manifests[-1], tmp_path)
    kept = sorted(path.name[:17] for path in (tmp_path / "r/policy").glob("step-*"))
    assert kept == [f"step-{step:012d}" for step in (0, *range(2, KEPT_VERSIONS + 1))]


def test_pull_makes_a_plain_folder(store: Store, make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder(seed=4)
    manifest = store.publish(folder, run_id="r", name="policy", step=1)
    store.pull(manifest, tmp_path / "out" / "plain")
    pulled = {path.name: path.read_bytes() for path in (tmp_path / "out" / "plain").iterdir()}
    assert pulled == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plain"]
    with pytest.raises(InvalidNameError, match="is there and not empty"):
        store.pull(manifest, tmp_path / "out" / "plain")


def test_from_pretrained_reads_a_fetched_version(local_store: Store, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    manifest = local_store.publish(tmp_path / "model", run_id="r", name="policy", step=1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(local_store.fetch(manifest))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)

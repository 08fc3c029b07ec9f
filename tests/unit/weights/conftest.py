"""Small model folders, written byte by byte as the safetensors format says, and stores of both kinds."""

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from tests.s3_server import s3_environment, s3_server
from trimtab.weights.store import Store, open_store

Tensors = dict[str, np.ndarray]
DTYPES = {"float32": "F32", "int32": "I32", "uint8": "U8", "float16": "F16"}


def _write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    body = b""
    for name, array in tensors.items():
        data = array.tobytes()
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        body += data
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)


@pytest.fixture
def write_safetensors() -> Callable[..., None]:
    """write_safetensors(path, {name: array}, metadata=None)."""
    return _write_safetensors


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder(seed=…, kib=…): a folder with one safetensors file, a config and a tokenizer."""

    def make(seed: int = 0, kib: int = 4) -> Path:
        folder = tmp_path / f"model-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        values = np.random.default_rng(seed).standard_normal((kib, 256)).astype(np.float32)
        _write_safetensors(folder / "model.safetensors", {"embed.weight": values, "norm": np.ones(7, np.float32)})
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """The same promises hold on a disk and on an object store."""
    if request.param == "local":
        yield open_store(f"file://{tmp_path}/store")
        return
    root = f"/{uuid.uuid4().hex}"
    yield open_store(f"memory:/{root}")
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(root):
        filesystem.rm(root, recursive=True)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A running S3 server's address."""
    pytest.importorskip("moto.server")
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A store in a bucket of its own; a second one opened on its URL sees the same."""
    for name, value in s3_environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(bucket)
    return open_store(f"s3://{bucket}/store")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("mounting a small file system needs privileges that this user lacks")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)

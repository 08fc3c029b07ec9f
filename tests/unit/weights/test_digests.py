import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from trimtab.weights.digests import (
    FileDigest,
    content_digest,
    digest_bytes,
    digest_file,
    folder_content_digest,
    read_safetensors_header,
    tensor_digest,
)
from trimtab.weights.errors import RefusedFileError

Write = Callable[..., None]

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5, dtype=np.int32)


def digest_of(folder: Path) -> str:
    return folder_content_digest(folder, [path.name for path in folder.iterdir()])


@pytest.fixture
def one_file(tmp_path: Path, write_safetensors: Write) -> Callable[..., str]:
    """one_file("name", a=…): the digest of a folder with these tensors in one file."""

    def write(folder: str, **tensors: np.ndarray) -> str:
        (tmp_path / folder).mkdir()
        write_safetensors(tmp_path / folder / "model.safetensors", tensors)
        return digest_of(tmp_path / folder)

    return write


def test_digest_does_not_depend_on_shards_order_or_metadata(
    tmp_path: Path, one_file: Callable[..., str], write_safetensors: Write
) -> None:
    whole = one_file("whole", a=A, b=B)
    assert whole == one_file("reordered", b=B, a=A)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    write_safetensors(sharded / "model-00001-of-00002.safetensors", {"b": B}, {"format": "pt"})
    write_safetensors(sharded / "model-00002-of-00002.safetensors", {"a": A})
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert whole == digest_of(sharded)


def test_digest_of_weights_in_memory_equals_that_of_their_files(tmp_path: Path, one_file: Callable[..., str]) -> None:
    tensors = [tensor_digest("b", "I32", (5,), B.tobytes()), tensor_digest("a", "F32", (3, 4), A.tobytes())]
    config = b'{"x": 1}'
    written = one_file("m", a=A, b=B)
    assert content_digest(tensors, []) == written
    (tmp_path / "m" / "config.json").write_bytes(config)
    other = FileDigest("config.json", digest_bytes(config))
    assert content_digest(tensors, [other]) == digest_of(tmp_path / "m") != written


@pytest.mark.parametrize(
    "changed",
    [
        {"a": A + np.float32(1e-7), "b": B},
        {"a": A.reshape(4, 3), "b": B},
        {"a": A.view(np.int32), "b": B},
        {"c": A, "b": B},
        {"a": A},
        {"a": A, "b": B, "c": B[:0]},
    ],
    ids=["one value", "shape", "dtype", "name", "one tensor less", "one empty tensor more"],
)
def test_digest_changes_with_anything_of_a_tensor(one_file: Callable[..., str], changed: dict[str, np.ndarray]) -> None:
    assert one_file("before", a=A, b=B) != one_file("after", **changed)


def test_header_reader_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    save_file({"z": A, "b": B, "empty": A[:0], "scalar": np.array(3, np.float32)}, tmp_path / "m.safetensors")
    slots = {slot.name: slot for slot in read_safetensors_header(tmp_path / "m.safetensors")}
    data = (tmp_path / "m.safetensors").read_bytes()
    assert (slots["z"].dtype, slots["z"].shape) == ("F32", (3, 4))
    assert data[slots["z"].start : slots["z"].end] == A.tobytes()
    assert (slots["empty"].shape, slots["scalar"].shape) == ((0, 4), ())


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, write_safetensors: Write) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": A})
    write_safetensors(tmp_path / "b.safetensors", {"w": A})
    with pytest.raises(RefusedFileError, match=r"'w' is in two safetensors files, the second is b\.safetensors"):
        digest_of(tmp_path)


def header(body_bytes: int, **entries: object) -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw + b"\0" * body_bytes


def entry(dtype: str, shape: list[object], begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x10\0\0",
        (2**63).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        header(4, a=entry("F32", [2], 0, 4)),
        header(4, a=entry("F32", [1], 4, 8)),
        header(8, a=entry("F32", [1], 0, 4)),
        header(2, a=entry("F32", [1], 0, 4)),
        header(4, a=entry("F32", [1], 0, 4), b=entry("F32", [1], 0, 4)),
        header(4, a=entry("F33", [1], 0, 4)),
        header(4, a=entry("F32", [-1], 0, -4)),
        header(4, a=entry("F32", [True], 0, 4)),
        header(4, a={"dtype": "F32"}),
        header(4, a=7),
    ],
)
def test_broken_safetensors_are_refused_with_their_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(RefusedFileError, match=r"^model\.safetensors"):
        read_safetensors_header(path)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_header_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    for content in (data, len(data).to_bytes(8, "little") + data, header(len(data), a={"dtype": "U8"}) + data):
        path.write_bytes(content)
        try:
            read_safetensors_header(path)
        except RefusedFileError:
            continue


def test_file_digest_is_blake3_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"")
    assert digest_file(tmp_path / "f") == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"

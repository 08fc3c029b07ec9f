"""Folders of tensors of any dtype, given as bits, for the delta tests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTHS = {"BF16": 2, "F32": 4, "F16": 2, "I64": 8, "U8": 1, "F8_E4M3": 1, "BOOL": 1, "F64": 8}


@dataclass(frozen=True)
class Bits:
    """A tensor: its dtype in safetensors' words, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def random_bits(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Bits:
    return Bits(dtype, shape, rng.bytes(int(np.prod(shape, dtype=np.int64)) * WIDTHS[dtype]))


def changed_bits(rng: np.random.Generator, bits: Bits, share: float) -> Bits:
    """The same tensor with about ``share`` of its elements changed to anything, NaNs among them."""
    elements = np.frombuffer(bits.data, f"<u{WIDTHS[bits.dtype]}").copy()
    where = rng.random(len(elements)) < share
    elements[where] = np.frombuffer(rng.bytes(int(where.sum()) * WIDTHS[bits.dtype]), elements.dtype)
    return Bits(bits.dtype, bits.shape, elements.tobytes())


def write_folder(folder: Path, files: Mapping[str, Mapping[str, Bits]], settings: str = "{}") -> Path:
    """A model folder with these safetensors files, a config and a tokenizer."""
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        body = b""
        for tensor_name, bits in tensors.items():
            offsets = [len(body), len(body) + len(bits.data)]
            header[tensor_name] = {"dtype": bits.dtype, "shape": list(bits.shape), "data_offsets": offsets}
            body += bits.data
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    (folder / "config.json").write_text(settings)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a plain folder by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

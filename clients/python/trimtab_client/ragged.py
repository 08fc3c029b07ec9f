"""Ragged arrays: sequences of different lengths as one numpy array and their lengths, to and from the wire.

Values travel as little-endian bytes and are read and written without work on each element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trimtab_client.v1 import tokens_pb2

IDS = np.dtype("<i4")
FLOATS = np.dtype("<f4")
INT32 = np.iinfo(np.int32)


class RaggedError(ValueError):
    """A ragged message that contradicts itself; `field` names what is wrong."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def as_ids(ids: ArrayLike) -> np.ndarray:
    """int32 [N] of token ids, a view where they are that already; RaggedError where they are no int32s."""
    array = np.asarray(ids)
    if array.ndim != 1:
        raise RaggedError("token_ids", f"one row of ids is needed, not an array of shape {array.shape}")
    if array.dtype == IDS:
        return array
    if array.size and array.dtype.kind not in "iu":
        raise RaggedError("token_ids", f"whole numbers are needed, not {array.dtype}")
    if array.size and not (INT32.min <= array.min() and array.max() <= INT32.max):
        raise RaggedError("token_ids", "an id does not fit into 32 bits")
    return array.astype(IDS)


def encode_ids(ids: ArrayLike) -> bytes:
    """int32 little-endian bytes of token ids; RaggedError where they are no int32s."""
    return as_ids(ids).tobytes()


def decode_ids(data: bytes, field: str = "token_ids") -> np.ndarray:
    """Token ids, int32 [N], a read-only view of the bytes."""
    return _decode(data, IDS, field)


def encode_floats(values: ArrayLike) -> bytes:
    """float32 little-endian bytes."""
    return np.ascontiguousarray(values, dtype=FLOATS).tobytes()


def decode_floats(data: bytes, field: str = "values") -> np.ndarray:
    """float32 [N], a read-only view of the bytes."""
    return _decode(data, FLOATS, field)


@dataclass(frozen=True, eq=False)
class RaggedTokens:
    """B sequences of token ids.

    Attributes:
        token_ids: int32 [N], sequence after sequence.
        lengths: int64 [B], tokens of each sequence.
        prompt_lengths: int64 [B], tokens of each prompt at its start, or None.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_lengths(self.lengths, self.token_ids, "token_ids")
        if self.prompt_lengths is not None:
            if self.prompt_lengths.shape != self.lengths.shape:
                raise RaggedError(
                    "prompt_lengths", f"{len(self.prompt_lengths)} entries for {len(self.lengths)} sequences"
                )
            if bool((self.prompt_lengths > self.lengths).any()) or bool((self.prompt_lengths < 0).any()):
                raise RaggedError("prompt_lengths", "a prompt is longer than its sequence")

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[ArrayLike], prompt_lengths: Sequence[int] | np.ndarray | None = None
    ) -> RaggedTokens:
        """From one array of ids a sequence."""
        arrays = [as_ids(sequence) for sequence in sequences]
        return cls(
            token_ids=np.concatenate(arrays) if arrays else np.zeros(0, IDS),
            lengths=np.array([len(array) for array in arrays], dtype=np.int64),
            prompt_lengths=None if prompt_lengths is None else np.asarray(prompt_lengths, dtype=np.int64),
        )

    @classmethod
    def from_proto(cls, message: tokens_pb2.RaggedTokens) -> RaggedTokens:
        """Read a message; RaggedError names the field that does not fit."""
        prompts = np.array(message.prompt_lengths, dtype=np.int64) if message.prompt_lengths else None
        return cls(decode_ids(message.token_ids), np.array(message.lengths, dtype=np.int64), prompts)

    def to_proto(self) -> tokens_pb2.RaggedTokens:
        """As it travels."""
        return tokens_pb2.RaggedTokens(
            token_ids=encode_ids(self.token_ids),
            lengths=self.lengths.tolist(),
            prompt_lengths=[] if self.prompt_lengths is None else self.prompt_lengths.tolist(),
        )

    def sequences(self) -> list[np.ndarray]:
        """A view of the ids of each sequence."""
        return _split(self.token_ids, self.lengths)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, eq=False)
class RaggedFloats:
    """float32 values [N] of B sequences; `lengths` int64 [B]."""

    values: np.ndarray
    lengths: np.ndarray

    def __post_init__(self) -> None:
        _check_lengths(self.lengths, self.values, "values")

    @classmethod
    def from_sequences(cls, sequences: Sequence[ArrayLike]) -> RaggedFloats:
        """From one array of values a sequence."""
        arrays = [np.asarray(sequence, dtype=FLOATS) for sequence in sequences]
        values = np.concatenate(arrays) if arrays else np.zeros(0, FLOATS)
        return cls(values, np.array([len(array) for array in arrays], dtype=np.int64))

    @classmethod
    def from_proto(cls, message: tokens_pb2.RaggedFloats) -> RaggedFloats:
        """Read a message; RaggedError names the field that does not fit."""
        return cls(decode_floats(message.values), np.array(message.lengths, dtype=np.int64))

    def to_proto(self) -> tokens_pb2.RaggedFloats:
        """As it travels."""
        return tokens_pb2.RaggedFloats(values=encode_floats(self.values), lengths=self.lengths.tolist())

    def split(self) -> list[np.ndarray]:
        """A view of the values of each sequence."""
        return _split(self.values, self.lengths)


def _decode(data: bytes, dtype: np.dtype, field: str) -> np.ndarray:
    if len(data) % dtype.itemsize:
        raise RaggedError(field, f"{len(data)} bytes is not a whole number of {dtype.itemsize}-byte values")
    return np.frombuffer(data, dtype=dtype)


def _check_lengths(lengths: np.ndarray, values: np.ndarray, field: str) -> None:
    if values.ndim != 1:
        raise RaggedError(field, f"one row of values is needed, not an array of shape {values.shape}")
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise RaggedError("lengths", f"one row of whole numbers is needed, not {lengths.dtype} {lengths.shape}")
    if bool((lengths < 0).any()):
        raise RaggedError("lengths", "a length is negative")
    if int(lengths.sum()) != len(values):
        raise RaggedError("lengths", f"add up to {int(lengths.sum())}, but {field} holds {len(values)} values")


def _split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []

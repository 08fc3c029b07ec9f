"""The ragged codec."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trimtab_client import (
    RaggedError,
    RaggedFloats,
    RaggedTokens,
    decode_floats,
    decode_ids,
    encode_floats,
    encode_ids,
)
from trimtab_client.v1 import tokens_pb2

ids = st.integers(-(2**31), 2**31 - 1)
sequences = st.lists(st.lists(ids, max_size=20), max_size=8)
rows = st.lists(arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)), max_size=8)


@given(sequences, st.data())
def test_tokens_survive_the_wire(sequences, data):
    prompts = [data.draw(st.integers(0, len(sequence))) for sequence in sequences] if sequences else None
    sent = RaggedTokens.from_sequences(sequences, prompts)
    message = tokens_pb2.RaggedTokens.FromString(sent.to_proto().SerializeToString())
    got = RaggedTokens.from_proto(message)
    assert [sequence.tolist() for sequence in got.sequences()] == sequences
    assert got.batch_size == len(sequences) and got.token_ids.dtype == np.int32
    assert (got.prompt_lengths.tolist() if got.prompt_lengths is not None else None) == prompts


@given(rows)
def test_floats_survive_the_wire_bit_by_bit(rows):
    message = RaggedFloats.from_sequences(rows).to_proto()
    got = RaggedFloats.from_proto(tokens_pb2.RaggedFloats.FromString(message.SerializeToString())).split()
    assert [row.tobytes() for row in got] == [row.tobytes() for row in rows]


def test_values_are_little_endian_on_the_wire():
    assert encode_ids([1, -2]) == struct.pack("<2i", 1, -2)
    assert encode_floats([0.5, -1.25]) == struct.pack("<2f", 0.5, -1.25)
    big = np.array([1, 2], dtype=">i8")
    assert decode_ids(encode_ids(big)).tolist() == [1, 2]


def test_decoding_copies_nothing():
    data = encode_ids(np.arange(1000))
    decoded = decode_ids(data)
    assert not decoded.flags.owndata and not decoded.flags.writeable
    ragged = RaggedTokens(decoded, np.array([400, 600]))
    assert all(np.shares_memory(sequence, decoded) for sequence in ragged.sequences())


@pytest.mark.parametrize("data", [b"1", b"12345"])
def test_bytes_that_are_no_whole_values_are_refused(data):
    with pytest.raises(RaggedError) as caught:
        decode_floats(data, "logprobs")
    assert caught.value.field == "logprobs"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (tokens_pb2.RaggedTokens(token_ids=b"123", lengths=[1]), "token_ids"),
        (tokens_pb2.RaggedTokens(token_ids=b"1234", lengths=[2]), "lengths"),
        (tokens_pb2.RaggedTokens(token_ids=b"1234"), "lengths"),
        (tokens_pb2.RaggedTokens(token_ids=b"1234" * 2, lengths=[2**32 - 1, 3]), "lengths"),
        (tokens_pb2.RaggedTokens(token_ids=b"1234", lengths=[1], prompt_lengths=[2]), "prompt_lengths"),
        (tokens_pb2.RaggedTokens(token_ids=b"1234", lengths=[1], prompt_lengths=[1, 0]), "prompt_lengths"),
    ],
)
def test_a_message_that_contradicts_itself_names_its_field(message, field):
    with pytest.raises(RaggedError) as caught:
        RaggedTokens.from_proto(message)
    assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")


def test_floats_that_do_not_fit_their_lengths_are_refused():
    with pytest.raises(RaggedError, match="add up to 3, but values holds 2"):
        RaggedFloats(np.zeros(2, np.float32), np.array([3]))


@pytest.mark.parametrize(
    "wrong", [[1.5, 2.0], [2**31], np.array([2**40]), np.array([[1, 2]]), ["a"], np.array([-(2**31) - 1])]
)
def test_ids_are_never_changed_silently(wrong):
    for encode in (encode_ids, lambda ids: RaggedTokens.from_sequences([ids])):
        with pytest.raises(RaggedError) as caught:
            encode(wrong)
        assert caught.value.field == "token_ids"


def test_negative_lengths_are_refused():
    with pytest.raises(RaggedError) as caught:
        RaggedTokens(np.zeros(1, np.int32), np.array([2, -1]))
    assert caught.value.field == "lengths"


def test_an_empty_batch_is_a_batch():
    empty = RaggedTokens.from_proto(RaggedTokens.from_sequences([]).to_proto())
    assert empty.batch_size == 0 and empty.sequences() == [] and RaggedFloats.from_sequences([]).split() == []
    assert [s.tolist() for s in RaggedTokens.from_sequences([[], [3], []]).sequences()] == [[], [3], []]

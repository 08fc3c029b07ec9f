"""Requests that are almost right: a message with fields of it made strange, or its bytes broken. All by one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS: dict[int, list[Any]] = {
    FieldDescriptor.TYPE_INT32: [0, 1, -1, 2**31 - 1, -(2**31)],
    FieldDescriptor.TYPE_INT64: [0, 1, -1, 2**63 - 1, -(2**63)],
    FieldDescriptor.TYPE_UINT32: [0, 1, 3, 65, 2**31, 2**32 - 1],
    FieldDescriptor.TYPE_UINT64: [0, 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_FIXED64: [0, 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_FLOAT: [0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf"), float("-inf")],
    FieldDescriptor.TYPE_DOUBLE: [0.0, -1.0, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")],
    FieldDescriptor.TYPE_BOOL: [False, True],
    FieldDescriptor.TYPE_ENUM: [0, 1],
}
TEXTS = [
    "",
    "\0",
    "x" * 5000,
    "../../etc/passwd",
    "/",
    "ü" * 90,
    "\U0001f600" * 900,
    "a b",
    "%s%n{0}",
    "\n",
    "w1 w2",
    "-",
    "²",  # str.isdigit() holds for it, int() refuses it
]
LONG_TEXT = "w1 " * 30_000


def mutated(message: Message, rng: random.Random) -> tuple[bytes, str]:
    """A changed copy of a request as bytes, and what was done to it."""
    copy = type(message)()
    copy.CopyFrom(message)
    changes = rng.choice([0, 1, 1, 1, 2, 4]) if message.DESCRIPTOR.fields else 0
    done = [_change_a_field(copy, rng) for _ in range(changes)]
    data = copy.SerializeToString()
    if rng.random() < 0.35 or not done:
        data, what = _break_bytes(data, rng)
        done.append(what)
    return data, ", ".join(done)


def _change_a_field(message: Message, rng: random.Random) -> str:
    holder, field = rng.choice(list(_fields(message)))
    if field.is_repeated:
        return f"{field.name} {_change_repeated(holder, field, rng)}"
    if rng.random() < 0.1:
        holder.ClearField(field.name)
        return f"{field.name} cleared"
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        getattr(holder, field.name).SetInParent()
        return f"{field.name} set"
    setattr(holder, field.name, _strange(field, rng))
    return f"{field.name} strange"


def _change_repeated(holder: Message, field: FieldDescriptor, rng: random.Random) -> str:
    values = getattr(holder, field.name)
    kind = rng.choice(["clear", "more", "many", "drop"])
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if kind == "clear" or is_map:
        holder.ClearField(field.name)
        return "clear"
    if kind == "drop" and len(values):
        del values[rng.randrange(len(values))]
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        for _ in range(300 if kind == "many" else 1):
            values.add()
    else:
        values.extend([_strange(field, rng) for _ in range(3000 if kind == "many" else 1)][:10_000])
    return kind


def _strange(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return LONG_TEXT if rng.random() < 0.02 else rng.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice([b"", rng.randbytes(rng.randrange(1, 40)), b"\xff" * 4 * rng.randrange(1, 9), bytes(4000)])
    return rng.choice(NUMBERS[field.type])


def _fields(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Every field of a message and of the messages that are set in it, with its holder."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        for inner in value if field.is_repeated else [value]:
            yield from _fields(inner)


def _break_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    kind = rng.choice(["cut", "flip", "insert", "noise", "utf8", "huge length", "deep", "twice", "empty"])
    place = rng.randrange(len(data) + 1)
    if kind == "cut":
        return data[:place], kind
    if kind == "flip" and data:
        place = min(place, len(data) - 1)
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :], kind
    if kind == "insert":
        return data[:place] + rng.randbytes(rng.randrange(1, 12)) + data[place:], kind
    if kind == "noise":
        return rng.randbytes(rng.randrange(1, 200)), kind
    if kind == "utf8":
        return data[:place] + b"\xff\xc0" + data[place + 2 :], kind
    if kind == "huge length":
        return data + bytes([rng.randrange(1, 16) << 3 | 2]) + b"\xff\xff\xff\xff\x07", kind
    if kind == "deep":
        for _ in range(rng.choice([50, 150])):
            data = b"\x0a" + _varint(len(data)) + data
        return data, kind
    return (data + data if kind == "twice" else b""), kind


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])

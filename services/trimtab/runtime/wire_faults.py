"""Where bytes stop being a message: the field that protobuf's own parser does not name.

It is no parser: it walks bytes that were refused, to say in the answer which field is at fault.
Wire format: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, FIXED64, BYTES, GROUP_START, GROUP_END, FIXED32 = 0, 1, 2, 3, 4, 5
DEEPEST = 100


class _FaultError(Exception):
    """`field` with dots and indices; "" for what stands outside any field."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def fault_in(method: str, payload: bytes) -> tuple[str, str]:
    """Field and reason for which `payload` is no request of `method` ("/package.Service/Method")."""
    whole = ("request", f"the {len(payload)} bytes are not a request of {method.rpartition('/')[2]}")
    try:
        message = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", ".")).input_type
    except KeyError:
        return whole
    try:
        _walk(message, memoryview(payload), "", 0)
    except _FaultError as fault:
        return (fault.field, fault.reason) if fault.field else (whole[0], fault.reason)
    return whole


def _walk(message: Descriptor | None, data: memoryview, path: str, depth: int) -> None:
    if depth > DEEPEST:
        raise _FaultError(path, f"is nested deeper than {DEEPEST} messages")
    fields = message.fields_by_number if message is not None else {}
    position, counts = 0, dict[int, int]()
    while position < len(data):
        tag, position = _varint(data, position, path)
        number, wire_type = tag >> 3, tag & 7
        field = fields.get(number)
        here = _place(field, path, counts) if field is not None else path
        if number == 0:
            raise _FaultError(path, "holds a field of number 0")
        if wire_type == VARINT:
            _, position = _varint(data, position, here)
        elif wire_type in (FIXED64, FIXED32):
            position = _past(data, position, 8 if wire_type == FIXED64 else 4, here)
        elif wire_type == BYTES:
            size, start = _varint(data, position, here)
            position = _past(data, start, size, here)
            if field is not None:
                _content(field, data[start:position], here, depth)
        else:
            raise _FaultError(here, f"has wire type {wire_type}, which is not used here")


def _content(field: FieldDescriptor, value: memoryview, here: str, depth: int) -> None:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            str(value, "utf-8")
        except UnicodeDecodeError as error:
            raise _FaultError(here, f"is not UTF-8 text ({error.reason} at byte {error.start})") from None
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        _walk(field.message_type, value, here, depth + 1)
    elif field.type != FieldDescriptor.TYPE_BYTES:
        _packed(field, value, here)


def _packed(field: FieldDescriptor, value: memoryview, here: str) -> None:
    size = {
        FieldDescriptor.TYPE_FIXED64: 8,
        FieldDescriptor.TYPE_SFIXED64: 8,
        FieldDescriptor.TYPE_DOUBLE: 8,
        FieldDescriptor.TYPE_FIXED32: 4,
        FieldDescriptor.TYPE_SFIXED32: 4,
        FieldDescriptor.TYPE_FLOAT: 4,
    }.get(field.type)
    if size is not None:
        if len(value) % size:
            raise _FaultError(here, f"{len(value)} bytes are no whole number of {size}-byte values")
        return
    position = 0
    while position < len(value):
        _, position = _varint(value, position, here)


def _place(field: FieldDescriptor, path: str, counts: dict[int, int]) -> str:
    """The field's name behind its parents', with the index of a repeated message or text."""
    name = f"{path}.{field.name}" if path else field.name
    nested = field.type in (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    if not (field.is_repeated and nested):
        return name
    index = counts.get(field.number, 0)
    counts[field.number] = index + 1
    return f"{name}[{index}]"


def _varint(data: memoryview, position: int, here: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise _FaultError(here, "ends too early")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _FaultError(here, "holds a number of more than 10 bytes")


def _past(data: memoryview, position: int, size: int, here: str) -> int:
    if position + size > len(data):
        raise _FaultError(here, "ends too early")
    return position + size

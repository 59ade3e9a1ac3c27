"""Looks at protobuf messages as they came, before anything is built of them."""

from __future__ import annotations

from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

_VARINT, _EIGHT_BYTES, _LENGTH, _GROUP, _GROUP_END, _FOUR_BYTES = range(6)
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
_MOST_BODY_FIELDS = 64
_BODY_DATA = 2


class TooManyFieldsError(ValueError):
    """A message holds more fields than allowed."""


def body_data(message: bytes) -> memoryview:
    """Return the ``data`` of a ``google.api.HttpBody`` without a copy; raises DecodeError."""
    view, at, data = memoryview(message), 0, memoryview(b"")
    for _ in range(_MOST_BODY_FIELDS):
        if at == len(message):
            return data
        tag, at = _varint(message, at)
        at, end = _skip(message, tag & 7, at)
        if tag >> 3 == _BODY_DATA and tag & 7 == _LENGTH:
            data = view[at:end]
        at = end
    raise DecodeError("more fields than a body has")


def count_fields(message: bytes, descriptor: Descriptor, most: int) -> int:
    """Count the fields of a message and of all messages inside, and the numbers of packed ones.

    Raises TooManyFieldsError as soon as there are more than ``most``, and DecodeError for what is no message.
    """
    count = 0
    pending = [(0, len(message), descriptor)]
    while pending:
        at, end, kind = pending.pop()
        inside, texts = _fields(kind)
        while at < end:
            count += 1
            if count > most:
                raise TooManyFieldsError
            tag, at = _varint(message, at)
            start, at = _skip(message, tag & 7, at)
            if at > end:
                raise DecodeError("a field is longer than its message")
            if tag & 7 == _LENGTH:
                number = tag >> 3
                if number in inside:
                    pending.append((start, at, inside[number]))
                elif number not in texts:
                    count += at - start
    return count


@cache
def _fields(kind: Descriptor) -> tuple[dict[int, Descriptor], frozenset[int]]:
    """Return the messages inside a message, and its texts, by their numbers."""
    fields = kind.fields_by_number
    return (
        {number: field.message_type for number, field in fields.items() if field.message_type is not None},
        frozenset(number for number, field in fields.items() if field.type in _TEXTS),
    )


def _skip(message: bytes, wire: int, at: int) -> tuple[int, int]:
    """Return where the content of a field begins and ends."""
    if wire == _LENGTH:
        length, at = _varint(message, at)
        end = at + length
    elif wire == _VARINT:
        _, end = _varint(message, at)
    elif wire in (_GROUP, _GROUP_END):
        end = at
    elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
        end = at + (8 if wire == _EIGHT_BYTES else 4)
    else:
        raise DecodeError("a field of no known kind")
    if end > len(message):
        raise DecodeError("a field is longer than the message")
    return at, end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DecodeError("a number without an end")

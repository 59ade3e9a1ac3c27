"""Looks at protobuf messages as they came, before anything is built of them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

_VARINT, _EIGHT_BYTES, _LENGTH, _GROUP, _GROUP_END, _FOUR_BYTES = range(6)
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


class Measured(NamedTuple):
    """What there is in a message and all messages inside.

    ``fields`` counts numbers of packed fields each; ``longest`` is what the largest text takes in memory, and
    ``more`` what all texts take there beyond what they came in, both in bytes.
    """

    fields: int
    longest: int
    more: int


def measure(message: bytes, descriptor: Descriptor, most: int) -> Measured:
    """Look at all fields of a message.

    Raises TooManyFieldsError as soon as there are more than ``most``, and DecodeError for what is no message.
    """
    count = longest = more = 0
    pending = [(0, len(message), descriptor)]
    while pending:
        at, end, kind = pending.pop()
        inside, strings, files = _fields(kind)
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
                elif number not in strings:
                    count += 0 if number in files else at - start
                else:
                    size = _text_bytes(message[start:at])
                    longest = max(longest, size)
                    more += max(0, size - (at - start))
    return Measured(count, longest, more)


def _text_bytes(utf8: bytes) -> int:
    """Return what a text takes in memory: one to four bytes a character, by the widest one."""
    if utf8.isascii():
        return len(utf8)
    found = np.frombuffer(utf8, np.uint8)
    widest = int(found.max())
    characters = int(np.count_nonzero(found & 0xC0 != 0x80))
    return characters * (4 if widest >= 0xF0 else 2 if widest >= 0xC4 else 1)


@cache
def _fields(kind: Descriptor) -> tuple[dict[int, Descriptor], frozenset[int], frozenset[int]]:
    """Return the messages inside a message, its texts and its bytes, by their numbers."""
    fields = kind.fields_by_number

    def of(type_: int) -> frozenset[int]:
        return frozenset(number for number, field in fields.items() if field.type == type_)

    inside = {
        number: field.message_type for number, field in fields.items() if field.message_type is not None
    }
    return inside, of(FieldDescriptor.TYPE_STRING), of(FieldDescriptor.TYPE_BYTES)


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

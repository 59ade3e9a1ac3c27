"""JSON objects of any size: measured before anything is built of them, and built a part at a time.

A parser builds whatever a body holds in one go, in which nothing else runs on the event loop. Here a look at
the bytes finds where values begin and end, without making objects and without holding the interpreter; then
a parser gets one part after the other. A body is taken and refused exactly as the parser alone would do it:
the parts and what stands between them are the whole of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, cast

import numpy as np
import orjson
from numpy.typing import NDArray

PART_BYTES = 1 << 16
"""Of one part, about; takes at most a millisecond or two to build, unless it is a single longer text."""

_PART_MARKS = 1 << 12
_BLOCK_BYTES = 1 << 17
_MOST_LEVELS = 64
_SHORT = 256
"""Up to here a text is looked at to know its width, which the overhead of a longer one does not blur."""

_QUOTE, _BACKSLASH, _COMMA, _COLON = 0x22, 0x5C, 0x2C, 0x3A
_OPEN, _CLOSE, _BRACKET, _BRACE = 0x7B, 0x7D, 0x5B, 0x20  # a bracket with the bit of _BRACE is a brace

_BLANKS = b" \t\n\r"
_HIGH_SURROGATES = (b"d8", b"d9", b"da", b"db")

Places = NDArray[np.int64]
Marks = NDArray[np.uint32]
"""Places of a whole body or numbers of its marks, in half the memory: no body has 4 GiB."""

Steps = Generator[None, None, Any]
"""Builds a value; something else may run at every ``next``."""

Charge = Callable[[int], None]
"""Is told the bytes that texts take in memory beyond those they came in; may refuse them by raising."""


class TooManyValuesError(ValueError):
    """A body holds more values than allowed."""


class StringTooLongError(ValueError):
    """A body holds a string longer than allowed, or one that takes more memory."""


class MalformedError(ValueError):
    """A body is not a JSON object. ``at`` is the byte where that shows, None where it is no object at all."""

    def __init__(self, reason: str, at: int | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


@dataclass(frozen=True, slots=True)
class Outline:
    """Where brackets, commas and colons stand outside of strings.

    ``marks`` are their offsets, ``kinds`` the bytes there, ``depths`` the depth behind each; ``values`` is
    how many values there are, within one for each list and object, and ``names`` how many have one.
    """

    data: memoryview
    marks: Marks
    kinds: NDArray[np.uint8]
    depths: NDArray[np.int32]
    values: int
    names: int


def outline(data: memoryview, most_values: int, longest_string: int) -> Outline:
    """Find the values of a JSON object; takes up to 10 ns a byte, mostly without the interpreter's lock.

    Raises TooManyValuesError as soon as there are more than ``most_values``, StringTooLongError for a string
    of more than about ``longest_string`` bytes, and MalformedError for what is surely no object.
    """
    whole = np.frombuffer(data, np.uint8)
    marks: list[Marks] = []
    kinds: list[NDArray[np.uint8]] = []
    inside = values = opened = 0
    escaped = False
    for start in range(0, len(whole), _BLOCK_BYTES):
        block = whole[start : start + _BLOCK_BYTES]
        quotes, escaped = _quotes(block, escaped)
        found = _structure(block)
        found = found[(np.searchsorted(quotes, found) + inside) & 1 == 0]
        inside = (inside + len(quotes)) & 1
        if len(quotes):
            opened = start + int(quotes[-1])
        if inside and start + len(block) - opened > longest_string:
            raise StringTooLongError
        kind = block[found]
        values += int(np.count_nonzero((kind == _COMMA) | (kind | _BRACE == _OPEN)))
        if values > most_values:
            raise TooManyValuesError
        marks.append((found + start).astype(np.uint32))
        kinds.append(kind)
    whole_marks, whole_kinds = np.concatenate(marks), np.concatenate(kinds)
    del marks, kinds  # before as much again is made
    return _checked(data, whole_marks, whole_kinds, values, bool(inside))


def build(parts: Outline, longest_string: int, charge: Charge) -> Steps:
    """Build the object; raises MalformedError for what the parser refuses, and StringTooLongError.

    One character of a text can make each of the others take four bytes: ``longest_string`` bounds the bytes
    of a string in memory, and ``charge`` is told what texts take beyond those they came in.
    """
    builder = _Builder(parts, longest_string, charge)
    return (yield from builder.value(0, len(parts.data), 0, len(parts.marks), 0))


def text_bytes(text: str) -> int:
    """Return about what a text takes in memory: one to four bytes a character, by the widest one."""
    if text.isascii():
        return len(text)
    if len(text) > _SHORT:
        return len(text) * (sys.getsizeof(text) // len(text))
    widest = max(text)
    return len(text) * (1 if widest < "\u0100" else 2 if widest < "\U00010000" else 4)


def items(parts: Outline, name: str) -> list[memoryview]:
    """Return the bytes of each item of the list that the object holds under ``name``, the last one of these.

    The object must be one that ``build`` takes. Empty if there is no such list.
    """
    data, marks = parts.data, parts.marks
    last = len(marks) - 1
    found: list[memoryview] = []
    for first, end in _between(parts, 0, last, 1):
        start, colon = int(marks[first]) + 1, int(marks[first + 1])
        if orjson.loads(data[start:colon]) != name:
            continue
        is_list = first + 2 < end and parts.kinds[first + 2] == _BRACKET
        edges = _between(parts, first + 2, end - 1, 2) if is_list else []
        found = [data[int(marks[a]) + 1 : int(marks[b])] for a, b in edges]
    return found


def _is_blank(data: memoryview) -> bool:
    if len(data) > 1 and data[0] not in _BLANKS:
        return False  # most are texts, which are not worth a copy
    return not bytes(data).strip(_BLANKS)


def _between(parts: Outline, first: int, last: int, depth: int) -> list[tuple[int, int]]:
    """Return the marks around each value of the container between the marks ``first`` and ``last``."""
    if _is_blank(parts.data[int(parts.marks[first]) + 1 : int(parts.marks[last])]):
        return []
    edges = [first, *_commas(parts, first + 1, last, depth).tolist(), last]
    return list(pairwise(edges))


def _commas(parts: Outline, first: int, last: int, depth: int) -> Marks:
    """Return which marks from ``first`` to before ``last`` are commas at a depth."""
    commas = parts.kinds[first:last] == _COMMA
    commas &= parts.depths[first:last] == depth
    found = np.flatnonzero(commas).astype(np.uint32)
    found += np.uint32(first)
    return found


def _structure(block: NDArray[np.uint8]) -> Places:
    braces = block | _BRACE
    return np.flatnonzero((braces == _OPEN) | (braces == _CLOSE) | (block == _COMMA) | (block == _COLON))


def _quotes(block: NDArray[np.uint8], escaped: bool) -> tuple[Places, bool]:
    """Return where strings begin and end, and whether what follows the block is escaped."""
    quotes = np.flatnonzero(block == _QUOTE)
    slashes = np.flatnonzero(block == _BACKSLASH)
    if escaped:
        quotes, slashes = quotes[quotes > 0], slashes[slashes > 0]
    if not len(slashes):
        return quotes, False
    breaks = np.flatnonzero(np.diff(slashes) != 1)
    firsts, lasts = slashes[np.append(0, breaks + 1)], slashes[np.append(breaks, -1)]
    # Of a run of backslashes each second one is escaped by the one before; an odd one escapes what follows.
    followers = lasts[(lasts - firsts) & 1 == 0] + 1
    unescaped = quotes[~np.isin(quotes, followers, assume_unique=True)]
    return unescaped, bool(len(followers)) and bool(followers[-1] == len(block))


def _checked(
    data: memoryview, marks: Marks, kinds: NDArray[np.uint8], values: int, open_string: bool
) -> Outline:
    """Refuse what is not one pair of braces with everything between them."""
    if not len(marks) or kinds[0] != _OPEN or not _is_blank(data[: int(marks[0])]):
        raise MalformedError("Input should be a valid JSON object", None)
    braces = kinds | _BRACE
    steps = (braces == _OPEN).view(np.int8) - (braces == _CLOSE).view(np.int8)
    depths = np.cumsum(steps, dtype=np.int32)
    closed = np.flatnonzero(depths <= 0)
    if open_string or not len(closed):
        raise MalformedError("unexpected end of data", len(data))
    if closed[0] != len(marks) - 1 or not _is_blank(data[int(marks[-1]) + 1 :]):
        raise MalformedError("unexpected content after document", int(marks[closed[0]]) + 1)
    names = int(np.count_nonzero(kinds == _COLON))
    return Outline(data, marks, kinds, depths, values, names)


class _Builder:
    """Builds the values of one outline."""

    def __init__(self, parts: Outline, longest_string: int, charge: Charge) -> None:
        self._parts = parts
        self._longest = longest_string
        self._charge = charge

    def value(self, start: int, end: int, first: int, last: int, level: int) -> Steps:
        """Build the value in the bytes ``start`` to ``end``, which hold the marks ``first`` to ``last``."""
        marks = self._parts.marks
        if first == last and end - start > PART_BYTES:
            return (yield from self._text(start, end))
        if self._is_small(start, end, first, last) or level > _MOST_LEVELS:
            yield
            return self._load(b"", start, end, b"")
        opening, closing = int(marks[first]), int(marks[last - 1])
        pair = self._parts.kinds[first], self._parts.kinds[last - 1]
        data = self._parts.data
        alone = _is_blank(data[start:opening]) and _is_blank(data[closing + 1 : end])
        if pair not in ((0x7B, 0x7D), (0x5B, 0x5D)) or not alone or _is_blank(data[opening + 1 : closing]):
            yield
            return self._load(b"", start, end, b"")
        made: Any = {} if pair[0] == _OPEN else []
        for part in self._groups(first, last - 1, level + 1):
            if isinstance(made, dict):
                yield from self._members(cast("dict[str, Any]", made), *part, level + 1)
            else:
                yield from self._elements(made, *part, level + 1)
        return made

    def _groups(self, first: int, last: int, depth: int) -> Generator[tuple[int, int, int]]:
        """Cut what is between two brackets into neighbouring values of about a part's size.

        Gives the marks before and behind, and the number of values where that is one, else 0.
        """
        marks = self._parts.marks
        ends = np.array([first, last], np.uint32)
        edges = np.concatenate([ends[:1], _commas(self._parts, first + 1, last, depth), ends[1:]])
        offsets = marks[edges]
        place = 0
        while place < len(edges) - 1:
            by_size = int(np.searchsorted(offsets, offsets[place] + PART_BYTES, "right")) - 1
            by_marks = int(np.searchsorted(edges, edges[place] + _PART_MARKS, "right")) - 1
            behind = max(place + 1, min(by_size, by_marks))
            yield int(edges[place]), int(edges[behind]), int(behind == place + 1)
            place = behind

    def _elements(self, made: list[Any], before: int, behind: int, alone: int, level: int) -> Steps:
        start, end = int(self._parts.marks[before]) + 1, int(self._parts.marks[behind])
        self._require(start, end)
        if alone:
            made.append((yield from self.value(start, end, before + 1, behind, level)))
            return
        yield
        made += self._load(b"[", start, end, b"]")

    def _members(self, made: dict[str, Any], before: int, behind: int, alone: int, level: int) -> Steps:
        start, end = int(self._parts.marks[before]) + 1, int(self._parts.marks[behind])
        self._require(start, end)
        if not alone or self._is_small(start, end, before, behind) or before + 1 == behind:
            yield
            made |= self._load(b"{", start, end, b"}")
            return
        if self._parts.kinds[before + 1] != _COLON:
            self._refuse("unexpected character, expected a colon", int(self._parts.marks[before + 1]))
        colon = int(self._parts.marks[before + 1])
        name = yield from self._text(start, colon)
        if not isinstance(name, str):
            self._refuse("object key must be a string", start)
        made[name] = yield from self.value(colon + 1, end, before + 2, behind, level)

    def _text(self, start: int, end: int) -> Steps:
        """Build a value without marks, which is a text if it is long, piece by piece."""
        data = self._parts.data
        first, last = start, end - 1
        while first < last and data[first] in _BLANKS:
            first += 1
        while first < last and data[last] in _BLANKS:
            last -= 1
        if last - first <= PART_BYTES or data[first] != _QUOTE or data[last] != _QUOTE:
            yield
            return self._load(b"", start, end, b"")
        pieces: list[str] = []
        at, length, width = first + 1, 0, 1
        while at < last:
            behind = last if last - at <= PART_BYTES else _boundary(data, at, at + PART_BYTES)
            piece = self._load(b'"', at, behind, b'"', charged=False)
            if piece:
                pieces.append(piece)
                length += len(piece)
                width = max(width, text_bytes(piece) // len(piece))
            if length * width > self._longest:
                raise StringTooLongError
            at = behind
            yield
        self._charge(max(0, length * width - (last - first)))
        return "".join(pieces)

    def _is_small(self, start: int, end: int, first: int, last: int) -> bool:
        return end - start <= PART_BYTES and last - first <= _PART_MARKS

    def _require(self, start: int, end: int) -> None:
        if _is_blank(self._parts.data[start:end]):
            self._refuse("unexpected character, expected a value", start)

    def _load(self, before: bytes, start: int, end: int, behind: bytes, *, charged: bool = True) -> Any:
        data = self._parts.data[start:end]
        whole = b"".join((before, data, behind))
        try:
            value = orjson.loads(whole)
        except orjson.JSONDecodeError as error:
            self._refuse(error.msg, min(start + error.pos - len(before), end))
        wide = charged and (not whole.isascii() or b"\\u" in whole)
        if wide and (more := _texts_bytes(value) - len(whole)) > 0:
            self._charge(more)
        return value

    def _refuse(self, reason: str, at: int) -> NoReturn:
        raise MalformedError(reason, at) from None


def _boundary(data: memoryview, start: int, end: int) -> int:
    """Return the last place up to ``end`` where a piece of a text that begins at ``start`` may end.

    That is behind whole characters and escapes, and not between the two escapes of one character.
    """
    for _ in range(3):
        if data[end] & 0xC0 == 0x80:
            end -= 1
    piece = bytes(data[start:end])
    if (len(piece) - len(piece.rstrip(b"\\"))) & 1:
        piece = piece[:-1]
    # An escape of six characters, or both of a pair, may begin in the last eleven.
    for _ in range(2):
        place = piece.rfind(b"\\u", max(0, len(piece) - 6))
        before = piece[:place]
        if place < 0 or (len(before) - len(before.rstrip(b"\\"))) & 1:
            break
        if len(piece) - place < 6 or piece[place + 2 : place + 4].lower() in _HIGH_SURROGATES:
            piece = before
        else:
            break
    return start + len(piece) if piece else end


def _texts_bytes(value: Any) -> int:
    """Return what the texts in a value take in memory."""
    total, pending = 0, [value]
    while pending:
        each = pending.pop()
        if isinstance(each, str):
            total += text_bytes(each)
        elif isinstance(each, list):
            pending.extend(cast("list[Any]", each))
        elif isinstance(each, dict):
            pending.extend(cast("dict[str, Any]", each))
            pending.extend(cast("dict[str, Any]", each).values())
    return total


def place_of(data: memoryview, at: int) -> tuple[int, int]:
    """Return line and column of a byte, both from 1."""
    before = bytes(data[:at])
    return before.count(b"\n") + 1, at - before.rfind(b"\n")

"""A body read part by part is taken, and refused, as the parser alone does it with the whole."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.requests import json_parts

TEXTS = st.text(st.sampled_from('a"\\{}[],: \n\té😀'), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
EDITS = st.tuples(
    st.sampled_from(["keep", "keep", "delete", "insert", "replace"]),
    st.integers(0, 1 << 16),
    st.sampled_from(b'{}[],:"\\ 1\x0b\xff'),
)


@pytest.fixture(autouse=True, scope="module")
def tiny_parts() -> Any:
    """Make every text a large one: parts of few bytes, and blocks that end inside of escapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_parts, "PART_BYTES", 12)
        patch.setattr(json_parts, "_PART_MARKS", 4)
        patch.setattr(json_parts, "_BLOCK_BYTES", 7)
        yield


def read(data: bytes) -> tuple[Any, json_parts.Outline]:
    parts = json_parts.outline(memoryview(data), 1 << 20, 1 << 20)
    steps = json_parts.build(parts, 1 << 20, lambda _: None)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value, parts


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(TEXTS | st.just("documents"), VALUES, max_size=4), st.booleans(), EDITS)
def test_parts_are_the_whole(value: dict[str, Any], spaced: bool, edit: tuple[str, int, int]) -> None:
    data = bytearray(json.dumps(value, indent=1 if spaced else None, ensure_ascii=not spaced).encode())
    what, where, byte = edit
    where %= len(data)
    if what == "delete":
        del data[where]
    elif what == "insert":
        data.insert(where, byte)
    elif what == "replace":
        data[where] = byte
    try:
        expected = orjson.loads(data)
    except orjson.JSONDecodeError:
        expected = None
    if not isinstance(expected, dict):
        with pytest.raises(json_parts.MalformedError):
            read(bytes(data))
        return
    found, parts = read(bytes(data))
    assert found == expected
    assert list(found) == list(expected)
    documents = expected.get("documents")
    items = [orjson.loads(item) for item in json_parts.items(parts, "documents")]
    assert items == (documents if isinstance(documents, list) else [])

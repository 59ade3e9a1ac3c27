from __future__ import annotations

import re

import pytest

from services.core.access.keys import digest, key_of, new_key
from services.core.errors import ErrorCode, ServiceError

KEY = "jina_" + "0123456789abcdef" * 2 + "A-_z" * 7


def test_the_form_of_a_key() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"jina_[0-9a-f]{32}[A-Za-z0-9_-]{28}", key) for key in keys)


def test_what_is_stored_is_not_the_key() -> None:
    assert len(digest(KEY)) == 32
    assert digest(KEY) != digest(KEY[:-1] + "A")


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY}"])
def test_a_well_formed_header(header: str) -> None:
    assert key_of(header) == KEY


@pytest.mark.parametrize("header", [None, "", "   "])
def test_no_header(header: str | None) -> None:
    assert refused(header) is ErrorCode.AUTH_MISSING_API_KEY


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Bearer sk-123",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}\n",
        f"Bearer {KEY[:-1]}é",
        f"Bearer {KEY.replace('jina_', 'JINA_')}",
        f"Bearer\t{KEY}",
        f"Bearer {KEY}, Bearer {KEY}",
        f"Bearer{KEY}",
    ],
)
def test_a_malformed_header(header: str) -> None:
    assert refused(header) is ErrorCode.AUTH_INVALID_FORMAT


def refused(header: str | None) -> ErrorCode:
    with pytest.raises(ServiceError) as error:
        key_of(header)
    assert error.value.spec.http_status == 401
    assert header is None or header.strip() in ("", "Bearer") or header not in error.value.detail
    return error.value.code

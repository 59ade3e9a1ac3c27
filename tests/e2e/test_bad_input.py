"""Every kind of bad input has its documented answer, through the real gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.conftest import Api
from tests.gateway.client import call, get, post
from tests.stack import MODEL

LONG = "word " * 200_000


def body(text: str) -> bytes:
    return b'{"model": "%s", "input": %s}' % (MODEL.encode(), text.encode("latin-1"))


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{",
        b"nonsense",
        body('"x",,'),
        body('"\xff\xfe"'),
        body('"\\ud800"'),
        body("[" * 100 + "]" * 100),
        body('{"a":' * 100 + "1" + "}" * 100),
        body("[" * 100_000 + "]" * 100_000),
        b"[]",
        b'"text"',
        b"null",
        body("5"),
        body("true"),
        body("null"),
        body("[]"),
        body("{}"),
        body("[[1, 2, 3]]"),
        body("[1, 2, 3]"),
        body('["a", null]'),
        body(json.dumps(["x"] * 2049)),
        b'{"input": "x"}',
        b'{"model": 5, "input": "x"}',
        b'{"model": null, "input": "x"}',
        b'{"model": "' + MODEL.encode() + b'"}',
    ],
    ids=lambda sent: f"{sent[:44]!r} {len(sent)}",
)
def test_what_does_not_validate(api: Api, sent: bytes) -> None:
    answer = api.post(sent)
    assert answer.error() == (422, "VALIDATION_ERROR")
    assert answer.json["errors"]
    for error in answer.json["errors"]:
        assert set(error) == {"field", "message", "type", "input"}
        assert error["field"].split(" -> ")[0] == "body"


@pytest.mark.parametrize(
    "fields",
    [
        {"dimensions": 0},
        {"dimensions": "many"},
        {"embedding_type": "int3"},
        {"normalized": "perhaps"},
        {"truncate": [True]},
    ],
    ids=str,
)
def test_fields_out_of_their_range(api: Api, fields: dict[str, Any]) -> None:
    answer = api.embed(**fields)
    assert answer.error() == (422, "VALIDATION_ERROR")
    (name,) = fields
    assert answer.json["errors"][0]["field"].startswith(f"body -> {MODEL} -> {name}")


@pytest.mark.parametrize("model", ["nope", "jina-ai/nope", "", "jina-embeddings-v3", "jina-ai/jina-clip-v2"])
def test_models_that_are_not_served(api: Api, model: str) -> None:
    answer = api.embed(model=model)
    assert answer.error() == (400, "INPUT_MODEL_NOT_FOUND")
    assert MODEL in answer.json["detail"]


@pytest.mark.parametrize("text", [LONG, "word " * 2_000_000], ids=["a million characters", "10 MB"])
def test_a_text_that_is_too_long(api: Api, text: str) -> None:
    answer = api.embed(text)
    assert answer.error() == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert "truncate" in answer.json["detail"]


@pytest.mark.parametrize("text", [LONG, "word " * 2_000_000], ids=["a million characters", "10 MB"])
def test_a_text_that_is_cut(api: Api, text: str) -> None:
    answer = api.embed(text, truncate=True)
    assert answer.status == 200
    assert answer.json["usage"]["total_tokens"] <= 512


@pytest.mark.parametrize(
    "given",
    ["", " ", "\n\t", "a\u0000b", "\u0000", "\U0001f600" * 50, "a\u202eb", ["", "x"], {"text": "x"}],
    ids=repr,
)
def test_odd_but_fine(api: Api, given: Any) -> None:
    answer = api.embed(given)
    assert answer.status == 200
    assert all(len(item["embedding"]) == 384 for item in answer.json["data"])


def test_unknown_fields_are_ignored(api: Api) -> None:
    plain = api.embed().json["data"]
    assert api.embed(user="me", colour={"a": [1]}, dimensions=None).json["data"] == plain


def test_a_body_beyond_the_limit(api: Api) -> None:
    answer = api.embed("x" * (64 << 20))
    assert answer.error() == (413, "INPUT_TOO_LARGE")


@pytest.mark.parametrize("path", ["/v1", "/v1/embedding", "/v1/embeddings/x", "/v1/ranking"])
def test_unknown_paths(api: Api, path: str) -> None:
    answer = post(api.stack.http_port, {}, api.authorization, path=path)
    assert answer.error() == (404, "ROUTE_NOT_FOUND")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_wrong_methods(api: Api, method: str) -> None:
    answer = call(api.stack.http_port, method, "/v1/embeddings", headers=api.authorization)
    assert answer.error() == (405, "METHOD_NOT_ALLOWED")


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({}, "AUTH_MISSING_API_KEY"),
        ({"authorization": ""}, "AUTH_MISSING_API_KEY"),
        ({"authorization": "Bearer "}, "AUTH_INVALID_FORMAT"),
        ({"authorization": "Basic abc"}, "AUTH_INVALID_FORMAT"),
        ({"authorization": "Bearer jina_short"}, "AUTH_INVALID_FORMAT"),
        ({"authorization": "Bearer jina_" + "0" * 60}, "AUTH_INVALID_API_KEY"),
    ],
    ids=str,
)
def test_keys_that_do_not_open(api: Api, header: dict[str, str], code: str) -> None:
    answer = post(api.stack.http_port, {"model": MODEL, "input": "x"}, header)
    assert answer.error() == (401, code)


@pytest.mark.parametrize(
    "path", ["/v1/models", f"/v1/models/{MODEL}", "/health", "/live", "/ready", "/openapi.json"]
)
def test_paths_that_need_no_key(api: Api, path: str) -> None:
    assert get(api.stack.http_port, path).status == 200
    assert get(api.stack.http_port, path, api.authorization).status == 200

"""Whatever headers a call has, it ends with a documented answer that is no fault of ours."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import Api
from tests.gateway.client import get
from tests.stack import MODEL, Stack

NAMES = """
accept accept-encoding accept-language authorization baggage cache-control connection content-encoding
content-language content-type cookie date dnt expect forwarded from grpc-accept-encoding grpc-encoding
grpc-message grpc-status grpc-status-details-bin grpc-tags-bin grpc-timeout grpc-trace-bin
http2-settings if-match if-modified-since if-none-match if-range if-unmodified-since keep-alive
max-forwards origin pragma prefer priority proxy-authorization range referer sf-content-length
sf-http-body sf-http-status te traceparent tracestate trailer upgrade-insecure-requests user-agent via
x-api-key x-b3-traceid x-envoy-expected-rq-timeout-ms x-envoy-external-address x-envoy-original-path
x-envoy-retry-on x-envoy-upstream-rq-timeout-ms x-forwarded-for x-forwarded-host x-forwarded-proto
x-model x-real-ip x-request-id x-sf-base-url x-sf-method x-stainless-os x_under_score
""".split()  # noqa: SIM905 - a list would be a line a name
VALUES = (
    "", "0", "1", "-1", "1n", "99999999999S", "*", "gzip", "deflate, br", "identity", "foo", "true",
    "null", "HEAD", "application/grpc", "application/grpc-web", "application/json; charset=utf-16",
    "multipart/form-data", "text/html", "bytes=0-", "bytes=-1", "bytes=9-1", '"tag"', 'W/"',
    "100-continue", "close", "keep-alive, te", "trailers", "%00%ff", "127.0.0.1", "http://a.example",
    "5xx", "Bearer x", "Bearer jina_" + "0" * 60, "=", "!!!", "AAAA", "x" * 4000,
)  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """All capabilities over one model, and a key."""
    with Stack(tmp_path_factory.mktemp("headers")) as stack:
        stack.serve("embed", "rerank", "classify", "batch")
        stack.gateway()
        yield Api(stack, stack.create_key())


def headers(chance: random.Random) -> dict[str, str]:
    """Some headers, most of a name and a value that mean something to somebody."""
    chosen: dict[str, str] = {}
    for _ in range(chance.randint(1, 5)):
        name = chance.choice(NAMES)
        if chance.random() < 0.2:
            name = "".join(chance.choices("abcxyz-!#$%&'*+.^`|~019", k=chance.randint(1, 20))) + "-bin"
        value = chance.choice(VALUES)
        if chance.random() < 0.3:
            value = "".join(
                map(chr, chance.choices([9, *range(32, 127), *range(128, 256)], k=chance.randint(1, 60)))
            )
        chosen[name] = value.strip()
    return chosen


def sent(method: str, path: str) -> bytes | None:
    """A body that the path takes."""
    if method != "post":
        return None
    bodies: dict[str, Any] = {
        "/v1/embeddings": {"model": MODEL, "input": "x"},
        "/v1/rerank": {"model": MODEL, "query": "x", "documents": ["a", "b"]},
        "/v1/classify": {"model": MODEL, "input": "x", "labels": ["a", "b"]},
    }
    return json.dumps(bodies.get(path, {})).encode()


@pytest.mark.parametrize(
    "number",
    [12, pytest.param(500, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
    ids=["short", "long"],
)
def test_no_header_is_a_fault_of_ours(everything: Api, number: int) -> None:
    port = everything.stack.http_port
    document = get(port, "/openapi.json").json
    chance = random.Random(20)
    for path, operations in document["paths"].items():
        known = {
            name: operations[name]["responses"] for name in operations if name in ("get", "post", "delete")
        }
        for method, responses in known.items():
            target = (
                path.replace("{model_id}", MODEL)
                .replace("{batch_id}", "none")
                .replace("{classifier_id}", "none")
            )
            for _ in range(number):
                own = everything.authorization | headers(chance)
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(method.upper(), target, sent(method, path), own)
                answer = connection.getresponse()
                body = answer.read()
                connection.close()
                what = f"{method} {target} {own}: {answer.status} {body[:300]!r}"
                assert answer.status < 500, what
                # Refusals of the HTTP itself are the same everywhere, and no operation lists them.
                assert str(answer.status) in {*responses, "400", "415", "404"}, what
                if answer.status >= 400:
                    assert json.loads(body)["request_id"] == answer.getheader("x-request-id"), what

"""What callers may send, and what the gateway answers by itself."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from contextlib import ExitStack
from http.client import HTTPException

import pytest

from tests.gateway.client import Answer, call, get, post, raw
from tests.gateway.conftest import StartGateway, pool
from tests.gateway.scripted import ScriptedService
from tests.servers import free_port
from tests.stack import MODEL, http_get

LIMIT = 20_000_000


@pytest.fixture(scope="module")
def port(shared_gateways: StartGateway, service: ScriptedService) -> int:
    return shared_gateways(pool(service), limits={"max_body_bytes": LIMIT}).http_port


def arrived(answer: Answer, body: bytes) -> bool:
    """Whether the service saw exactly this body."""
    assert answer.status == 200, answer
    return answer.json["sha256"] == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "m",,}',
        b"[]",
        b'"text"',
        b'{"input": "\xff\xfe"}',
        b'{"input": "\\ud800"}',
        b'{"input": "a\\u0000b"}',
        b"\x00\x01\x02",
        b"[" * 100 + b"]" * 100,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"input": "' + b"x" * 10_000_000 + b'"}',
    ],
    ids=lambda body: f"{body[:12]!r} {len(body)}",
)
def test_a_body_reaches_the_service_as_it_is(port: int, body: bytes) -> None:
    assert arrived(post(port, body), body)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "nonsense"])
def test_any_content_type_will_do(port: int, content_type: str) -> None:
    assert arrived(post(port, b'{"a": 1}', {"content-type": content_type}), b'{"a": 1}')


def test_a_body_in_chunks(port: int) -> None:
    parts = [b"x" * 1000] * 3000
    answer = call(port, "POST", "/v1/embeddings", iter(parts), {"content-type": "application/json"})
    assert arrived(answer, b"".join(parts))


def test_a_body_of_the_allowed_size(port: int) -> None:
    body = b"x" * LIMIT
    assert arrived(post(port, body), body)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(port: int, service: ScriptedService, *, chunked: bool) -> None:
    body = b"x" * (LIMIT + 1)
    parts = (body[i : i + 100_000] for i in range(0, len(body), 100_000)) if chunked else body
    answer = call(port, "POST", "/v1/embeddings", parts)
    assert answer.error() == (413, "INPUT_TOO_LARGE")
    assert str(LIMIT) in answer.json["detail"]
    assert not service.calls


def test_a_caller_may_ask_before_it_sends(port: int) -> None:
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\nconnection: close\r\n"
        b"content-length: 2\r\n\r\n{}"
    )
    received = raw(port, head)
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("size", [1_000_000, 2_000_000, 10_000_000, 100_000_000])
def test_large_answers(port: int, size: int) -> None:
    answer = post(port, {"do": "answer", "bytes": size})
    assert (answer.status, len(answer.body)) == (200, size)
    assert answer.headers["content-type"] == "application/json"


def test_an_answer_beyond_all_bounds_is_an_error(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    limits = {"max_response_bytes": 2_000_000, "max_body_bytes": 1_000_000}
    port = start_gateway(pool(service), limits=limits).http_port
    assert post(port, {"do": "answer", "bytes": 1_900_000}).status == 200
    assert post(port, {"do": "answer", "bytes": 4_000_000}).error() == (500, "INTERNAL_ERROR")


def test_headers_of_the_service_reach_the_caller(port: int) -> None:
    headers = {"x-ratelimit-remaining-requests": "4", "server-timing": "queue;dur=0.1"}
    answer = post(port, {"do": "nothing", "headers": headers})
    assert headers.items() <= answer.headers.items()


def test_what_the_service_gets_of_the_headers(port: int) -> None:
    metadata = post(
        port,
        {},
        {
            "authorization": "Bearer k",
            "traceparent": "00-1-2-01",
            "cookie": "secret",
            "accept-encoding": "gzip",
            "x-envoy-upstream-rq-timeout-ms": "1",
            "x_under_score": "1",
        },
    ).json["metadata"]
    assert metadata["authorization"] == "Bearer k"
    assert metadata["traceparent"] == "00-1-2-01"
    assert metadata["x-envoy-original-path"] == "/v1/embeddings"
    assert "x-forwarded-for" in metadata
    assert not {"cookie", "x_under_score", "x-envoy-upstream-rq-timeout-ms"} & set(metadata)


class TestRequestId:
    def test_made_when_absent(self, port: int) -> None:
        answers = [post(port, {}) for _ in range(50)]
        ids = {answer.headers["x-request-id"] for answer in answers}
        assert len(ids) == 50
        assert all(re.fullmatch(r"[0-9a-f]{32}", name) for name in ids)
        assert {answer.json["metadata"]["x-request-id"] for answer in answers} == ids

    def test_passed_on_and_echoed(self, port: int) -> None:
        answer = post(port, {}, {"x-request-id": "Mine-1.2:3/a+b=@_"})
        assert answer.headers["x-request-id"] == "Mine-1.2:3/a+b=@_"
        assert answer.json["metadata"]["x-request-id"] == "Mine-1.2:3/a+b=@_"

    @pytest.mark.parametrize("unusable", ['a"b', "a b", "x" * 129, "é", ""])
    def test_replaced_when_unusable(self, port: int, unusable: str) -> None:
        answer = post(port, {}, {"x-request-id": unusable})
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])

    def test_in_errors_of_the_gateway(self, port: int) -> None:
        answer = get(port, "/nothing", {"x-request-id": "mine"})
        assert answer.error() == (404, "ROUTE_NOT_FOUND")
        assert answer.json["request_id"] == "mine"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/embeddings/",
        "/v1/embedding",
        "/V1/EMBEDDINGS",
        "/v1/../etc/passwd",
        "/searchfoundation.v1.EmbedRestService/CreateEmbeddings",
        "/searchfoundation.v1.OpsService/Ready",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_paths_nobody_knows(port: int, service: ScriptedService, method: str, path: str) -> None:
    assert call(port, method, path, b"{}" if method == "POST" else None).error() == (404, "ROUTE_NOT_FOUND")
    assert not service.calls


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/embeddings", "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("PUT", "/v1/embeddings", "POST"),
        ("OPTIONS", "/v1/embeddings", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", f"/v1/models/{MODEL}", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("POST", "/ready", "GET, HEAD"),
        ("PATCH", "/openapi.json", "GET, HEAD"),
    ],
)
def test_wrong_methods(port: int, method: str, path: str, allowed: str) -> None:
    answer = call(port, method, path)
    assert answer.error() == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == allowed


def test_query_strings_do_no_harm(port: int) -> None:
    assert arrived(post(port, b"{}", path="/v1/embeddings?a=1&b.c=2&data=x"), b"{}")
    assert get(port, "/v1/models?limit=5").status == 200


@pytest.mark.parametrize("path", ["/health", "/live"])
def test_health(port: int, path: str) -> None:
    assert get(port, path).json == {"status": "ok"}
    head = call(port, "HEAD", path)
    assert (head.status, head.body) == (200, b"")


class TestModels:
    def test_the_list(self, port: int) -> None:
        listed = get(port, "/v1/models").json
        assert listed["object"] == "list"
        assert [info["id"].rpartition("/")[2] for info in listed["data"]] == [MODEL]

    @pytest.mark.parametrize("prefix", ["", "jina-ai/", "jinaai/", "jina-ai%2F", "jina-ai%2f"])
    def test_one_model(self, port: int, prefix: str) -> None:
        assert get(port, f"/v1/models/{prefix}{MODEL}").json == get(port, "/v1/models").json["data"][0]

    @pytest.mark.parametrize(
        ("path", "name"),
        [
            ("nope", "nope"),
            ("jina-ai/nope?x=1", "jina-ai/nope"),
            ("jina-embeddings-v3", "jina-embeddings-v3"),
            ("a%22%5Cb%0A", 'a"\\b\n'),
            (f"{MODEL}/", f"{MODEL}/"),
            ("", ""),
        ],
    )
    def test_a_model_that_is_not_served(self, port: int, path: str, name: str) -> None:
        answer = get(port, f"/v1/models/{path}")
        assert answer.error() == (404, "RESOURCE_NOT_FOUND")
        assert answer.json["detail"].startswith(f"Model '{name}' not found")


def test_the_openapi_document(port: int) -> None:
    document = get(port, "/openapi.json").json
    assert "/v1/embeddings" in document["paths"]


class TestBrowsers:
    @pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/models"])
    def test_preflight(self, port: int, path: str) -> None:
        answer = call(
            port,
            "OPTIONS",
            path,
            headers={
                "origin": "https://a.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            },
        )
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in answer.headers

    @pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/v1/embeddings", "/health"])
    def test_every_answer_can_be_read(self, port: int, path: str) -> None:
        answer = get(port, path, {"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "retry-after" in answer.headers["access-control-expose-headers"]

    def test_the_answer_of_a_service_can_be_read(self, port: int) -> None:
        answer = post(port, {}, {"origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"

    def test_other_callers_see_nothing_of_it(self, port: int) -> None:
        assert not [name for name in post(port, {}).headers if name.startswith("access-control")]

    def test_only_named_origins(self, start_gateway: StartGateway, service: ScriptedService) -> None:
        port = start_gateway(pool(service), cors={"origins": ["https://a.example"]}).http_port
        preflight = {"access-control-request-method": "POST"}
        for origin, allowed in [("https://a.example", True), ("https://axexample", False)]:
            answer = post(port, {}, {"origin": origin})
            assert ("access-control-allow-origin" in answer.headers) == allowed
            asked = call(port, "OPTIONS", "/v1/embeddings", headers={"origin": origin, **preflight})
            assert (asked.status == 200) == allowed

    def test_none_at_all(self, start_gateway: StartGateway, service: ScriptedService) -> None:
        port = start_gateway(pool(service), cors={"origins": []}).http_port
        assert "access-control-allow-origin" not in post(port, {}, {"origin": "https://a.example"}).headers


@pytest.mark.parametrize("accepts", ["identity", "gzip", "gzip, deflate, br", ""])
def test_no_compression_by_default(port: int, accepts: str) -> None:
    answer = post(port, {"do": "answer", "bytes": 5000}, {"accept-encoding": accepts})
    assert "content-encoding" not in answer.headers
    assert len(answer.body) == 5000


@pytest.fixture(scope="module")
def compressing(shared_gateways: StartGateway, service: ScriptedService) -> int:
    return shared_gateways(pool(service), compression=True).http_port


@pytest.mark.parametrize(("accepts", "encoded"), [("identity", False), ("", False), ("gzip", True)])
def test_compression_on_request(compressing: int, accepts: str, *, encoded: bool) -> None:
    answer = post(compressing, {"do": "answer", "bytes": 5000}, {"accept-encoding": accepts})
    assert (answer.headers.get("content-encoding") == "gzip") == encoded
    assert (len(answer.body) < 5000) == encoded


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"FOO /v1/embeddings HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400),
        (
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n"
            b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nx-big: " + b"y" * 70_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_not_http(port: int, request_bytes: bytes, status: int) -> None:
    head, _, body = raw(port, request_bytes).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == str(status).encode()
    document = json.loads(body)
    assert document["code"] in ("INPUT_INVALID", "INPUT_TOO_LARGE")
    assert document["detail"]


@pytest.fixture(scope="module")
def impatient(shared_gateways: StartGateway, service: ScriptedService) -> int:
    return shared_gateways(pool(service), timeouts={"receive": 0.5, "headers": 0.5}).http_port


def test_a_body_that_never_ends(impatient: int, service: ScriptedService) -> None:
    received = raw(impatient, b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert received.startswith(b"HTTP/1.1 408 ")
    document = json.loads(received.partition(b"\r\n\r\n")[2])
    assert document["code"] == "REQUEST_TIMEOUT"
    assert "0.5 seconds" in document["detail"]
    assert not service.calls


def test_headers_that_never_end(impatient: int) -> None:
    assert raw(impatient, b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\n").startswith(b"HTTP/1.1 408 ")


def test_statistics_for_prometheus(start_gateway: StartGateway, service: ScriptedService) -> None:
    metrics = free_port()
    stack = start_gateway(pool(service), metrics={"port": metrics})
    post(stack.http_port, {})
    status, text = http_get(metrics, "/stats/prometheus")
    assert status == 200
    assert b'envoy_cluster_upstream_rq_completed{envoy_cluster_name="scripted"} 1' in text
    assert http_get(metrics, "/config_dump")[0] == 404
    assert http_get(metrics, "/")[0] == 404
    assert http_get(metrics, "/live")[0] == 200


def test_liveness_does_not_depend_on_load(start_gateway: StartGateway, service: ScriptedService) -> None:
    metrics = free_port()
    stack = start_gateway(pool(service), metrics={"port": metrics}, limits={"max_connections": 4})
    with ExitStack() as held:
        for _ in range(8):
            held.enter_context(socket.create_connection(("127.0.0.1", stack.http_port)))
        with pytest.raises((ConnectionError, HTTPException)):
            http_get(stack.http_port, "/live")
        for _ in range(8):
            assert http_get(metrics, "/live")[0] == 200

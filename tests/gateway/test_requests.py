"""What callers may send, and what the gateway answers by itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import socket
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

import pytest

from tests.gateway.client import Answer, call, get, post, raw
from tests.gateway.conftest import StartGateway, pool
from tests.gateway.scripted import ScriptedService
from tests.servers import free_port
from tests.stack import MODEL, child_of, http_get, wait_for

LIMIT = 20_000_000
LIMITS = {"max_body_bytes": LIMIT, "max_text_body_bytes": LIMIT}


@pytest.fixture(scope="module")
def port(shared_gateways: StartGateway, service: ScriptedService) -> int:
    return shared_gateways(pool(service), limits=LIMITS).http_port


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


def test_a_body_is_as_large_as_its_capability_needs(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    limits = {"max_body_bytes": 3_000_000, "max_text_body_bytes": 1_000_000}
    served = pool(service, capabilities=["embed", "rerank", "classify", "batch"])
    port = start_gateway(served, limits=limits).http_port
    # The scripted service knows embeddings alone, and says so of what reaches it.
    reached = {"/v1/embeddings": 200, "/v1/rerank": 404, "/v1/classify": 404, "/v1/train": 404}
    for path, status in reached.items():
        assert post(port, b"x" * 1_000_000, path=path).status == status
        refused = post(port, b"x" * 1_000_001, path=path)
        assert refused.error() == (413, "INPUT_TOO_LARGE")
        assert refused.json["detail"] == "Request body exceeds the maximum of 1000000 bytes."
    assert post(port, b"x" * 3_000_000, path="/v1/batch/embeddings").status == 404


def test_a_model_of_pictures_takes_larger_bodies(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    limits = {"max_body_bytes": 3_000_000, "max_text_body_bytes": 1_000_000}
    port = start_gateway(pool(service, "jina-clip-v2"), limits=limits).http_port
    assert post(port, b"x" * 3_000_000).status == 200
    assert post(port, b"x" * 3_000_001).json["detail"] == "Request body exceeds the maximum of 3000000 bytes."


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
    known = {"authorization": "Bearer k", "traceparent": "00-1-2-01", "range": "bytes=0-1", "if-match": "x"}
    others = {
        "cookie": "secret",
        "accept-encoding": "gzip",
        "content-encoding": "identity",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x_under_score": "1",
        "x-sf-base-url": "http://evil",
        "x-sf-method": "HEAD",
        "te": "trailers",
        "x-anything": "1",
    }
    metadata = post(port, {}, known | others).json["metadata"]
    assert known.items() <= metadata.items()
    added = {"x-envoy-original-path", "x-envoy-external-address", "x-forwarded-for", "x-request-id"}
    assert set(metadata) - {"user-agent"} == set(known) | added
    assert metadata["x-envoy-original-path"] == "/v1/embeddings"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grpc-encoding", "foo"),
        ("grpc-timeout", "garbage"),
        ("grpc-timeout", "1n"),
        ("grpc-status", "13"),
        ("grpc-message", "%"),
        ("foo-bin", "!!!"),
        ("x-title", "caf\xe9"),
        ("traceparent", "\xff\xfe"),
        ("sf-http-status", "500"),
        ("x-envoy-original-path", "/x"),
        ("x-envoy-retry-on", "5xx"),
        ("expect", "100-continue"),
        ("content-type", "application/json; charset=\xe9"),
    ],
)
def test_headers_mean_nothing_to_the_hop_behind(port: int, name: str, value: str) -> None:
    answer = post(port, b"{}", {name: value})
    assert arrived(answer, b"{}")
    assert answer.json["metadata"].get(name) in (None, "/v1/embeddings")


def test_a_key_that_no_header_may_hold_is_a_wrong_key(port: int) -> None:
    assert post(port, {}, {"authorization": "Bearer caf\xe9"}).json["metadata"]["authorization"] == "?"


class TestPackedBodies:
    BODY = json.dumps({"input": "word " * 200_000}).encode()

    @pytest.mark.parametrize("coding", ["gzip", "GZIP"])
    def test_unpacked(self, port: int, coding: str) -> None:
        packed = gzip.compress(self.BODY)
        assert len(packed) < len(self.BODY) / 100
        assert arrived(post(port, packed, {"content-encoding": coding}), self.BODY)

    def test_unpacked_in_chunks(self, port: int) -> None:
        body = random.Random(1).randbytes(500_000).hex().encode()
        packed = gzip.compress(body)
        parts = (packed[i : i + 10_000] for i in range(0, len(packed), 10_000))
        answer = call(port, "POST", "/v1/embeddings", parts, {"content-encoding": "gzip"})
        assert arrived(answer, body)

    def test_identity_is_no_packing(self, port: int) -> None:
        assert arrived(post(port, self.BODY, {"content-encoding": "identity"}), self.BODY)

    @pytest.mark.parametrize(
        "coding", ["deflate", "compress", "x-gzip", "gzip, gzip", "br, gzip", "aws-chunked"]
    )
    def test_what_nobody_unpacks(self, port: int, service: ScriptedService, coding: str) -> None:
        answer = post(port, gzip.compress(b"{}"), {"content-encoding": coding})
        assert answer.error() == (415, "UNSUPPORTED_CONTENT_ENCODING")
        assert answer.headers["accept-encoding"] == "gzip, br, zstd"
        assert not service.calls

    def test_a_bomb(self, start_gateway: StartGateway, service: ScriptedService) -> None:
        stack = start_gateway(pool(service), limits=LIMITS)
        assert post(stack.http_port, b"x" * LIMIT).status == 200
        assert stack.envoy is not None
        envoy = child_of(stack.envoy)
        before = memory_at_most(envoy)
        bomb = gzip.compress(b"\0" * (1 << 30))
        answer = post(stack.http_port, bomb, {"content-encoding": "gzip"})
        assert answer.error() == (413, "INPUT_TOO_LARGE")
        assert memory_at_most(envoy) - before < 256 << 20
        assert not service.calls[1:]

    def test_what_is_damaged_reaches_nobody_whole(self, port: int) -> None:
        answer = post(port, gzip.compress(self.BODY)[:-300], {"content-encoding": "gzip"})
        assert answer.json["sha256"] != hashlib.sha256(self.BODY).hexdigest()


def memory_at_most(pid: int) -> int:
    """The most bytes that a process has had resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


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
        "/v1",
        "/v1/embeddings/x",
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


@pytest.mark.parametrize(
    "path",
    ["//v1/embeddings", "/v1//embeddings", "/v1/embeddings/", "/v1/embeddings/?a=/", "//v1//embeddings//"],
)
def test_slashes_too_many(port: int, path: str) -> None:
    assert arrived(post(port, b"{}", path=path), b"{}")


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{MODEL}", "/openapi.json", "/ready"])
def test_a_slash_at_the_end_of_what_is_read(port: int, path: str) -> None:
    assert get(port, path + "/").json == get(port, path).json
    assert call(port, "PUT", path + "/").error() == (405, "METHOD_NOT_ALLOWED")


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
            (f"{MODEL}/x", f"{MODEL}/x"),
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
                "access-control-request-headers": "authorization,content-type,x-stainless-os",
            },
        )
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
        vary = {name.strip() for name in answer.headers["vary"].split(",")}
        assert vary == {"origin", "access-control-request-method", "access-control-request-headers"}
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


POST = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\n"
GET = b"GET /health HTTP/1.1\r\n"
MANY = b"".join(b"x-%d: 1\r\n" % number for number in range(1001))


@pytest.mark.parametrize(
    ("request_bytes", "status", "words"),
    [
        (b"hello\r\n\r\n", 400, "could not be read"),
        (b"BREW /health HTTP/1.1\r\nhost: x\r\n\r\n", 400, "method"),
        (GET + b"\r\n", 400, "no Host header"),
        (GET + b"host: x y\r\n\r\n", 400, "Host header"),
        (GET + b"host: x\r\nbad header\r\n\r\n", 400, "could not be read"),
        (GET + b"host: x\r\nx-a: a\x01b\r\n\r\n", 400, "character"),
        (GET + b"host: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 400, "upgraded"),
        (POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "Content-Length"),
        (POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400, "length"),
        (POST + b"content-length: -1\r\n\r\n", 400, "length"),
        (POST + b"transfer-encoding: xchunked\r\n\r\n{}", 400, "Transfer-Encoding"),
        (POST + b"transfer-encoding: chunked, identity\r\n\r\n{}", 400, "Transfer-Encoding"),
        (GET + b"host: x\r\nx-big: " + b"y" * 70_000 + b"\r\n\r\n", 431, "60 KiB"),
        (GET + b"host: x\r\n" + MANY + b"\r\n", 431, "1000 headers"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_not_http(port: int, request_bytes: bytes, status: int, words: str) -> None:
    head, _, body = raw(port, request_bytes).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == str(status).encode()
    document = json.loads(body)
    assert document["code"] in ("INPUT_INVALID", "INPUT_TOO_LARGE")
    assert words in document["detail"]
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert document["request_id"].encode() == fields[b"x-request-id"]


def test_the_log_knows_what_was_not_http(start_gateway: StartGateway, service: ScriptedService) -> None:
    stack = start_gateway(pool(service))
    told = json.loads(raw(stack.http_port, b"hello\r\n\r\n").partition(b"\r\n\r\n")[2])["request_id"]
    get(stack.http_port, "/nothing?api_key=secret")
    wait_for(lambda: len(stack.access_log()) >= 2)
    assert told in [line["request_id"] for line in stack.access_log()]
    assert "/nothing" in [line["path"] for line in stack.access_log()]
    assert stack.envoy is not None
    assert "secret" not in stack.envoy.text()


def test_two_hundred_headers_are_fine(port: int) -> None:
    headers = {f"x-{number}": "1" for number in range(200)}
    assert post(port, {}, headers).status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /v1/models HTTP/1.0\r\nhost: x\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}",
    ],
)
def test_http_1_0(port: int, request_bytes: bytes) -> None:
    head, _, body = raw(port, request_bytes).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == b"200"
    assert b"transfer-encoding" not in head
    assert json.loads(body)


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
    assert b" 200 OK\r\n" in raw(metrics, b"GET /live HTTP/1.0\r\n\r\n")


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

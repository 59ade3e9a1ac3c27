"""Two pools, told apart by the model that a request names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.gateway.client import call, get, post
from tests.gateway.conftest import OTHER_MODEL, StartGateway, pool
from tests.gateway.scripted import NOT_SERVING, SERVING, ScriptedService
from tests.stack import MODEL, Stack, wait_for

EMBED = "/searchfoundation.v1.EmbedService/Embed"


@pytest.fixture(scope="module")
def first() -> Iterator[ScriptedService]:
    scripted = ScriptedService("first")
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture(scope="module")
def second() -> Iterator[ScriptedService]:
    scripted = ScriptedService("second")
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture(scope="module")
def stack(shared_gateways: StartGateway, first: ScriptedService, second: ScriptedService) -> Stack:
    limits = {"max_body_bytes": 12_000_000}
    return shared_gateways(pool(first), pool(second, OTHER_MODEL), limits=limits)


def body_of(model: str, text: bytes = b'"x"') -> bytes:
    return b'{"input": ' + text + b', "model": ' + json.dumps(model).encode() + b"}"


@pytest.mark.parametrize(
    ("body", "served_by"),
    [
        (body_of(MODEL), "first"),
        (body_of(OTHER_MODEL), "second"),
        (body_of(f"jina-ai/{OTHER_MODEL}"), "second"),
        (body_of(f"jinaai/{OTHER_MODEL}"), "second"),
        # Whose repository it is, the service of that pool knows.
        (body_of(f"other/{OTHER_MODEL}"), "second"),
        (body_of(OTHER_MODEL.upper()), "first"),
        (body_of("unheard-of"), "first"),
        (b'{"input": "x"}', "first"),
        (b'{"input": "x", "model": 5}', "first"),
        (b'{"input": "x", "model": null}', "first"),
        (b'{"input": "x", "model": ["jina-embeddings-v3"]}', "first"),
        (b'{"input": {"model": "jina-embeddings-v3"}}', "first"),
        (b'{"model": "all-MiniLM-L6-v2", "model": "jina-embeddings-v3"}', "second"),
        (b'{"model": "' + b"m" * 100_000 + b'"}', "first"),
        (b'["jina-embeddings-v3"]', "first"),
        (b"", "first"),
        (b'{"model": "jina-embeddings-v3",,}', "first"),
        (body_of(OTHER_MODEL, b'"\xff"'), "first"),
        (body_of(OTHER_MODEL, b'"\\u0000"'), "second"),
        (body_of(OTHER_MODEL, b"[" * 100 + b"]" * 100), "second"),
        (body_of(OTHER_MODEL, b"[" * 50_000 + b"]" * 50_000), "first"),
        (body_of(OTHER_MODEL, b'"' + b"x" * 10_000_000 + b'"'), "second"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[:30]!r} {len(value)}",
)
def test_the_model_of_the_body_picks_the_pool(stack: Stack, body: bytes, served_by: str) -> None:
    answer = post(stack.http_port, body)
    assert answer.status == 200
    assert answer.json["service"] == served_by
    assert answer.json["length"] == len(body)


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/json; charset=utf-8"])
def test_whatever_the_content_type(stack: Stack, content_type: str) -> None:
    answer = post(stack.http_port, body_of(OTHER_MODEL), {"content-type": content_type})
    assert answer.json["service"] == "second"


def test_a_body_in_chunks(stack: Stack) -> None:
    body = body_of(OTHER_MODEL, b'"' + b"x" * 3_000_000 + b'"')
    parts = (body[i : i + 1000] for i in range(0, len(body), 1000))
    answer = call(stack.http_port, "POST", "/v1/embeddings", parts)
    assert (answer.json["service"], answer.json["length"]) == ("second", len(body))


def test_a_body_that_is_too_large(stack: Stack) -> None:
    body = body_of(OTHER_MODEL, b'"' + b"x" * 13_000_000 + b'"')
    assert post(stack.http_port, body).error() == (413, "INPUT_TOO_LARGE")


def test_models_of_all_pools_are_listed(stack: Stack) -> None:
    listed = get(stack.http_port, "/v1/models").json["data"]
    assert [info["id"].rpartition("/")[2] for info in listed] == [MODEL, OTHER_MODEL]
    for model in (MODEL, OTHER_MODEL, f"jina-ai/{OTHER_MODEL}"):
        assert get(stack.http_port, f"/v1/models/{model}").status == 200


@pytest.fixture(scope="module")
def aliased(shared_gateways: StartGateway, first: ScriptedService, second: ScriptedService) -> Stack:
    names = {"ours": OTHER_MODEL, "set apart": OTHER_MODEL, "text-embedding-3-small": MODEL}
    apart = pool(first) | {"models": [MODEL, "set apart"]}
    other = pool(second, f"jina-ai/{OTHER_MODEL}")
    return shared_gateways(apart, other, settings={"SF_MODEL_ALIASES": json.dumps(names)})


class TestAliases:
    """Names that an operator gave to models: served by the pool of the model, or by one of their own."""

    @pytest.mark.parametrize(
        ("model", "served_by"),
        [
            ("ours", "second"),
            ("set apart", "first"),
            ("text-embedding-3-small", "first"),
            (OTHER_MODEL, "second"),
            (f"jinaai/{OTHER_MODEL}", "second"),
            (MODEL, "first"),
        ],
    )
    def test_an_alias_picks_the_pool(self, aliased: Stack, model: str, served_by: str) -> None:
        assert post(aliased.http_port, body_of(model)).json["service"] == served_by
        with grpc.insecure_channel(f"127.0.0.1:{aliased.grpc_port}") as channel:
            _, rpc = channel.unary_unary(EMBED).with_call(b"m", metadata=(("x-model", model),))
            assert dict(rpc.trailing_metadata())["served-by"] == served_by

    def test_aliases_are_listed(self, aliased: Stack) -> None:
        listed = {info["id"] for info in get(aliased.http_port, "/v1/models").json["data"]}
        assert listed == {MODEL, f"jina-ai/{OTHER_MODEL}", "ours", "set apart", "text-embedding-3-small"}
        assert get(aliased.http_port, "/v1/models/ours").status == 200


def logged(stack: Stack) -> dict[str, Any]:
    return {entry["request_id"]: entry for entry in stack.access_log()}


class TestGrpc:
    @pytest.fixture(params=["http_port", "grpc_port"])
    def channel(self, stack: Stack, request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(f"127.0.0.1:{getattr(stack, request.param)}") as channel:
            yield channel

    @pytest.mark.parametrize(
        ("metadata", "served_by"),
        [
            ((), "first"),
            ((("x-model", OTHER_MODEL),), "second"),
            ((("x-model", f"jina-ai/{OTHER_MODEL}"),), "second"),
            ((("x-model", "unheard-of"),), "first"),
        ],
    )
    def test_a_metadata_entry_picks_the_pool(
        self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...], served_by: str
    ) -> None:
        answer, rpc = channel.unary_unary(EMBED).with_call(b"message", metadata=metadata)
        assert answer == b"message"
        trailing = dict(rpc.trailing_metadata())
        assert trailing["served-by"] == served_by

    def test_the_access_log_tells_its_status(self, channel: grpc.Channel, stack: Stack) -> None:
        _, rpc = channel.unary_unary(EMBED).with_call(b"message", metadata=(("x-request-id", "logged-grpc"),))
        assert rpc.code() is grpc.StatusCode.OK
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(EMBED)(b"fail", metadata=(("x-request-id", "logged-failure"),))
        post(stack.http_port, body_of(MODEL), {"x-request-id": "logged-rest"})
        wait_for(lambda: logged(stack).keys() >= {"logged-grpc", "logged-failure", "logged-rest"})
        lines = logged(stack)
        assert lines["logged-grpc"]["grpc_status"] == 0
        assert lines["logged-failure"]["grpc_status"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert (lines["logged-rest"]["status"], "grpc_status" in lines["logged-rest"]) == (200, False)

    def test_errors_stay_as_they_are(self, channel: grpc.Channel) -> None:
        with pytest.raises(grpc.RpcError) as failure:
            channel.unary_unary(EMBED)(b"fail")
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failure.value.details() == "typed failure"
        assert dict(failure.value.trailing_metadata())["retry-after"] == "7"

    def test_a_request_id_is_made(self, channel: grpc.Channel, first: ScriptedService) -> None:
        channel.unary_unary(EMBED)(b"message")
        assert len(first.calls[-1][1]["x-request-id"]) == 32

    @pytest.mark.parametrize(
        "path",
        [
            "/searchfoundation.v1.OpsService/Ready",
            "/searchfoundation.v1.EmbedRestService/CreateEmbeddings",
            "/v1/embeddings",
            "/v2/embed",
            "/api/embed",
            "/a.B/C",
        ],
    )
    def test_nothing_else_is_reachable(
        self, channel: grpc.Channel, path: str, first: ScriptedService, second: ScriptedService
    ) -> None:
        with pytest.raises(grpc.RpcError) as failure:
            channel.unary_unary(path)(b"")
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert not [*first.unknown, *second.unknown]


def test_rest_is_not_on_the_port_for_grpc(stack: Stack) -> None:
    # That port speaks HTTP/1.1, too, to refuse in words.
    assert call(stack.grpc_port, "POST", "/v1/embeddings", b"{}").status == 404


class TestReady:
    @pytest.fixture(autouse=True)
    def restored(self, first: ScriptedService, second: ScriptedService) -> Iterator[None]:
        fine = second.ready
        yield
        second.ready = fine
        second.health.set("", SERVING)

    def test_every_pool_is_listed(self, stack: Stack) -> None:
        checks = {"status": "ok", "checks": {"engine": "ok"}}
        answer = get(stack.http_port, "/ready")
        assert answer.status == 200
        assert answer.json == {"status": "ok", "checks": {"first": checks, "second": checks}}

    def test_a_check_of_one_pool_fails(self, stack: Stack, second: ScriptedService) -> None:
        second.ready = b'{"status":"unavailable","checks":{"engine":"ok","redis":"unavailable"}}'
        answer = get(stack.http_port, "/ready", {"x-request-id": "mine"})
        assert answer.error() == (503, "SERVICE_UNAVAILABLE")
        assert answer.json["request_id"] == "mine"
        assert "second" in answer.json["detail"]
        assert answer.json["checks"]["second"]["checks"]["redis"] == "unavailable"
        assert answer.json["checks"]["first"]["status"] == "ok"
        assert "retry-after" in answer.headers

    def test_a_pool_that_makes_do(self, stack: Stack, second: ScriptedService) -> None:
        second.ready = b'{"status":"degraded","checks":{"engine":"ok","redis":"degraded: away"}}'
        answer = get(stack.http_port, "/ready")
        assert (answer.status, answer.json["status"]) == (200, "degraded")
        assert answer.json["checks"]["second"]["checks"]["redis"] == "degraded: away"

    def test_a_pool_without_a_serving_endpoint(self, stack: Stack, second: ScriptedService) -> None:
        second.health.set("", NOT_SERVING)
        wait_for(lambda: get(stack.http_port, "/ready").status == 503)
        answer = get(stack.http_port, "/ready")
        assert answer.json["checks"]["second"] == {"status": "unavailable"}
        refused = post(stack.http_port, body_of(OTHER_MODEL))
        assert refused.error() == (503, "SERVICE_UNAVAILABLE")
        assert post(stack.http_port, body_of(MODEL)).status == 200
        assert get(stack.http_port, "/live").status == 200
        second.health.set("", SERVING)
        wait_for(lambda: get(stack.http_port, "/ready").status == 200)
        assert post(stack.http_port, body_of(OTHER_MODEL)).status == 200

    def test_head(self, stack: Stack) -> None:
        answer = call(stack.http_port, "HEAD", "/ready")
        assert (answer.status, answer.body) == (200, b"")


def test_calls_are_spread_over_endpoints(start_gateway: StartGateway) -> None:
    services = [ScriptedService(f"twin-{i}") for i in range(2)]
    for twin in services:
        twin.start()
    both = pool(services[0], addresses=[twin.address for twin in services])
    port = start_gateway(both).http_port
    wait_for(lambda: {post(port, {}).json["service"] for _ in range(10)} == {"twin-0", "twin-1"})
    services[1].stop()
    # An endpoint that refuses connections costs no call: it is tried elsewhere.
    assert {post(port, {}).json["service"] for _ in range(20)} == {"twin-0"}
    services[0].stop()

"""Errors that the gateway makes, in the form that the clients of each path read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from gateway.contract import rest_calls
from gateway.openapi import build_openapi
from search_foundation.capabilities import implemented
from services.core.catalog import Catalog
from services.core.catalog.types import Capability
from services.core.errors import ERRORS, ErrorCode
from services.core.forms import FORMS, form_of
from tests.gateway.client import Answer, call, post
from tests.gateway.conftest import OTHER_MODEL, StartGateway, pool
from tests.gateway.scripted import ScriptedService
from tests.stack import MODEL

LIMIT = 1000
PATHS = {
    "Cohere": "/v2/embed",
    "Tei": "/embed",
    "Gemini": "/v1beta/models/m:embedContent",
    "Ollama": "/api/embed",
}
UNKNOWN = {"Cohere": "/v2/nope", "Tei": "/predict/", "Gemini": "/v1beta/nope?x=1", "Ollama": "/api/nope"}


def shown(name: str, answer: Answer) -> Any:
    """What a vendor's own client takes the reason from."""
    body = answer.json
    match name:
        case "Cohere":
            return body["message"]
        case "Tei":
            assert body["error_type"] in ("Backend", "Overloaded", "Validation")
            return body["error"]
        case "Gemini":
            assert set(body["error"]) == {"code", "message", "status"}
            assert body["error"]["code"] == answer.status
            assert re.fullmatch("[A-Z_]+", body["error"]["status"])
            return body["error"]["message"]
        case _:
            return body["error"]


def must_be_formed(name: str, answer: Answer, code: ErrorCode) -> None:
    assert (answer.status, answer.json["code"]) == (ERRORS[code].http_status, code)
    assert answer.json["request_id"] == answer.headers["x-request-id"]
    assert shown(name, answer) == answer.json["detail"] != ""


@pytest.fixture(scope="module")
def small(shared_gateways: StartGateway, service: ScriptedService) -> int:
    # Below the largest body of all, the gateway reads a body to its end before the service hears of the call:
    # this one answers at once that it does not know the method.
    limits = {"max_body_bytes": 4 * LIMIT, "max_text_body_bytes": LIMIT}
    return shared_gateways(pool(service), limits=limits).http_port


def unknown_path(port: int, name: str) -> Answer:
    return post(port, {}, path=UNKNOWN[name])


def bare_status(port: int, name: str) -> Answer:
    """The service knows none of these methods and says so by a bare gRPC status."""
    return post(port, {}, path=PATHS[name])


def too_large(port: int, name: str) -> Answer:
    return post(port, b" " * 2 * LIMIT, path=PATHS[name])


def wrong_method(port: int, name: str) -> Answer:
    return call(port, "PUT", PATHS[name] + "/", b"{}")


def wrong_coding(port: int, name: str) -> Answer:
    return post(port, {}, {"content-encoding": "compress"}, PATHS[name])


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(
    ("code", "ask"),
    [
        (ErrorCode.ROUTE_NOT_FOUND, unknown_path),
        (ErrorCode.ROUTE_NOT_FOUND, bare_status),
        (ErrorCode.INPUT_TOO_LARGE, too_large),
        (ErrorCode.METHOD_NOT_ALLOWED, wrong_method),
        (ErrorCode.UNSUPPORTED_CONTENT_ENCODING, wrong_coding),
    ],
)
def test_errors_of_the_gateway(
    small: int, name: str, code: ErrorCode, ask: Callable[[int, str], Answer]
) -> None:
    must_be_formed(name, ask(small, name), code)


def test_a_service_that_is_away(start_gateway: StartGateway) -> None:
    gone = ScriptedService("gone")
    gone.start()
    gone.stop()
    stack = start_gateway(pool(gone), ready=False)
    port = stack.await_listening()
    for name, path in PATHS.items():
        answer = post(port, {}, path=path)
        must_be_formed(name, answer, ErrorCode.SERVICE_UNAVAILABLE)
        assert "retry-after" in answer.headers
    assert post(port, {}).error() == (503, "SERVICE_UNAVAILABLE")


def test_a_model_in_the_path_finds_its_pool(start_gateway: StartGateway, service: ScriptedService) -> None:
    other = ScriptedService("other")
    other.start()
    port = start_gateway(pool(service), pool(other, OTHER_MODEL)).http_port
    for path in (
        f"/v1beta/models/{OTHER_MODEL}:embedContent",
        f"/v1/models/jina-ai/{OTHER_MODEL}:embedContent",
    ):
        post(port, {}, path=path)
    post(port, {"model": f"{OTHER_MODEL}:latest"}, path="/api/embed")
    post(port, {}, path="/v1beta/models/all-MiniLM-L6-v2:embedContent")
    assert (len(other.unknown), len(service.unknown)) == (3, 1)
    other.stop()


def test_a_call_without_a_model_finds_the_pool_that_can(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    sparse = ScriptedService("sparse")
    sparse.start()
    pools = (pool(service), pool(sparse, "elser-v2"))
    port = start_gateway(*pools).http_port
    for path in ("/embed", "/embed_sparse", "/info"):
        call(port, "GET" if path == "/info" else "POST", path, b"{}")
    assert [each["x-envoy-original-path"] for each in sparse.unknown] == ["/embed_sparse"]
    assert [each["x-envoy-original-path"] for each in service.unknown] == ["/embed", "/info"]
    port = start_gateway(*pools, settings={"SF_DEFAULT_MODEL": "elser-v2"}).http_port
    call(port, "GET", "/info")
    post(port, {}, path="/embed")
    post(port, {"model": MODEL}, path="/embed_sparse")
    assert [each["x-envoy-original-path"] for each in sparse.unknown[1:]] == ["/info"]
    assert [each["x-envoy-original-path"] for each in service.unknown[2:]] == ["/embed", "/embed_sparse"]
    sparse.stop()


def test_the_table_knows_every_path_of_the_contract() -> None:
    calls = [call for capability in implemented() for call in rest_calls(capability)]
    for each in calls:
        path = each.path.replace("**", "a").replace("{", "").replace("}", "")
        matching = [form for form in FORMS if re.fullmatch(form.paths, path)]
        expected = form_of(each.rpc)
        assert matching == ([] if expected is None else [expected]), each


def test_the_document_has_a_chapter_for_each_vendor() -> None:
    specs = Catalog.load().select([MODEL, "jina-colbert-v2", "elser-v2", "jina-clip-v1"])
    served = {
        capability: [spec for spec in specs if spec.supports(capability)]
        for capability in (Capability.EMBED, Capability.RERANK)
    }
    document = build_openapi(served)
    paths: dict[str, set[str]] = {}
    for capability in served:
        for each in rest_calls(capability):
            paths.setdefault(each.rpc, set()).add(each.path.replace("**", "{model}"))
    for rpc, known in paths.items():
        described = [document["paths"][path] for path in known if path in document["paths"]]
        assert described, f"{rpc} is not described"
    tags = {tag["name"] for tag in document["tags"]}
    used = {tag for path in document["paths"].values() for each in path.values() for tag in each["tags"]}
    assert used <= tags
    assert used >= {"Cohere", "Voyage", "Text Embeddings Inference", "Gemini", "Ollama"}


@pytest.mark.parametrize("headers", [{"x-goog-api-key": "k1"}, {"x-api-key": "k1"}, {"api-key": "k1"}, {}])
def test_keys_as_others_send_them(port: int, service: ScriptedService, headers: dict[str, str]) -> None:
    post(port, {}, headers)
    post(port, {}, headers | {"authorization": "Bearer mine"})
    (_, first, _), (_, second, _) = service.calls
    assert first.get("authorization") == ("Bearer k1" if headers else None)
    assert second["authorization"] == "Bearer mine"


def test_a_key_in_the_query_is_one_on_geminis_paths_alone(port: int, service: ScriptedService) -> None:
    post(port, {}, path="/v1beta/models/m:embedContent?alt=json&key=k1")
    post(port, {}, path="/v1/embeddings?key=k1")
    (of_gemini,) = service.unknown
    assert of_gemini["authorization"] == "Bearer k1"
    assert of_gemini["x-envoy-original-path"] == "/v1beta/models/m:embedContent"
    ((_, of_ours, _),) = service.calls
    assert "authorization" not in of_ours

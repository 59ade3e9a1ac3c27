"""What becomes of a service's failure on the REST side."""

from __future__ import annotations

import json

import pytest

from tests.gateway.client import http2_frames, post
from tests.gateway.conftest import StartGateway, pool
from tests.gateway.scripted import ScriptedService

BODY = '{"detail":"Too long.","code":"VALIDATION_ERROR","request_id":"abc"}'
DATA, HEADERS = 0, 1
DESCRIBED = {"sf-http-status": "422", "sf-http-body": BODY}


@pytest.mark.parametrize("headers", [{}, {"server-timing": "queue;dur=1"}], ids=["alone", "after headers"])
def test_a_described_error_is_the_answer(port: int, headers: dict[str, str]) -> None:
    script = {
        "do": "abort",
        "status": "INVALID_ARGUMENT",
        "headers": headers,
        "trailers": {**DESCRIBED, "retry-after": "3", "x-ratelimit-remaining-tokens": "12"},
    }
    answer = post(port, script)
    assert (answer.status, answer.body.decode()) == (422, BODY)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "12"
    assert headers.items() <= answer.headers.items()


def test_nothing_of_grpc_shows(port: int) -> None:
    failed = post(port, {"do": "abort", "status": "INVALID_ARGUMENT", "trailers": DESCRIBED})
    fine = post(port, {})
    for answer in (failed, fine):
        assert not [name for name in answer.headers if name.startswith(("grpc-", "sf-", "x-envoy"))]


@pytest.mark.parametrize(
    "script", [{"do": "nothing"}, {"do": "abort", "status": "INTERNAL", "headers": {"a": "b"}}]
)
def test_no_trailers_reach_callers_over_http2(port: int, script: dict[str, object]) -> None:
    frames = http2_frames(port, json.dumps(script).encode())
    data = [index for index, (kind, _) in enumerate(frames) if kind == DATA]
    assert b"{" in frames[data[0]][1]
    assert HEADERS not in [kind for kind, _ in frames[data[0] :]]


def test_an_error_of_many_fields_passes_whole(port: int) -> None:
    body = json.dumps({"detail": "x", "code": "VALIDATION_ERROR", "errors": ["y" * 100] * 500})
    script = {
        "do": "abort",
        "status": "INVALID_ARGUMENT",
        "trailers": {"sf-http-status": "422", "sf-http-body": body},
    }
    answer = post(port, script)
    assert (answer.status, answer.body.decode()) == (422, body)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("CANCELLED", (503, "SERVICE_UNAVAILABLE")),
        ("UNKNOWN", (500, "INTERNAL_ERROR")),
        ("INVALID_ARGUMENT", (400, "INPUT_INVALID")),
        ("DEADLINE_EXCEEDED", (504, "SERVICE_TIMEOUT")),
        ("NOT_FOUND", (404, "ROUTE_NOT_FOUND")),
        ("ALREADY_EXISTS", (500, "INTERNAL_ERROR")),
        ("PERMISSION_DENIED", (403, "AUTHZ_INSUFFICIENT_BALANCE")),
        ("RESOURCE_EXHAUSTED", (413, "INPUT_TOO_LARGE")),
        ("FAILED_PRECONDITION", (500, "INTERNAL_ERROR")),
        ("ABORTED", (500, "INTERNAL_ERROR")),
        ("OUT_OF_RANGE", (500, "INTERNAL_ERROR")),
        ("UNIMPLEMENTED", (404, "ROUTE_NOT_FOUND")),
        ("INTERNAL", (500, "INTERNAL_ERROR")),
        ("UNAVAILABLE", (503, "SERVICE_UNAVAILABLE")),
        ("DATA_LOSS", (500, "INTERNAL_ERROR")),
        ("UNAUTHENTICATED", (401, "AUTH_INVALID_API_KEY")),
    ],
)
@pytest.mark.parametrize("headers", [{}, {"server-timing": "queue;dur=1"}], ids=["alone", "after headers"])
def test_a_bare_status_gets_the_documented_body(
    port: int, status: str, expected: tuple[int, str], headers: dict[str, str]
) -> None:
    answer = post(port, {"do": "abort", "status": status, "headers": headers})
    assert answer.error() == expected
    assert ("retry-after" in answer.headers) == (expected[0] == 503)


def test_an_exception_tells_nothing_of_itself(port: int) -> None:
    answer = post(port, {"do": "raise"})
    assert answer.error() == (500, "INTERNAL_ERROR")
    assert b"secret" not in answer.body


def test_a_slow_answer_is_a_timeout_and_the_service_is_told(
    start_gateway: StartGateway, service: ScriptedService
) -> None:
    port = start_gateway(pool(service), timeouts={"request": 0.5}).http_port
    answer = post(port, {"do": "sleep", "seconds": 2})
    assert answer.error() == (504, "SERVICE_TIMEOUT")
    assert "0.5 seconds" in answer.json["detail"]
    assert service.cancelled.wait(10)
    assert len(service.calls) == 1, "a call that took too long is not sent again"


def test_no_retry_of_what_a_service_has_seen(port: int, service: ScriptedService) -> None:
    answer = post(port, {"do": "fail_once"})
    assert answer.error() == (503, "SERVICE_UNAVAILABLE")
    assert len(service.calls) == 1


def test_too_many_calls_at_once_are_refused(start_gateway: StartGateway, service: ScriptedService) -> None:
    from concurrent.futures import ThreadPoolExecutor

    port = start_gateway(pool(service), limits={"max_requests_per_pool": 2}).http_port
    with ThreadPoolExecutor(12) as threads:
        script = {"do": "sleep", "seconds": 0.5}
        answers = list(threads.map(lambda _: post(port, script), range(12)))
    statuses = sorted(answer.status for answer in answers)
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 2
    for answer in answers:
        if answer.status == 503:
            assert answer.error() == (503, "SERVICE_UNAVAILABLE")
            assert int(answer.headers["retry-after"]) >= 1


def test_a_service_that_dies_and_comes_back(start_gateway: StartGateway) -> None:
    scripted = ScriptedService("mortal")
    scripted.start()
    stack = start_gateway(pool(scripted))
    assert post(stack.http_port, {}).status == 200
    scripted.stop()
    answer = post(stack.http_port, {})
    assert answer.error() == (503, "SERVICE_UNAVAILABLE")
    assert "retry-after" in answer.headers
    scripted.start()
    stack.wait_until_ready()
    assert post(stack.http_port, {}).status == 200
    scripted.stop()

"""Overload, ends, restarts and callers who leave."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.e2e.load import LOST, REFUSED, Load
from tests.gateway.client import get, post
from tests.stack import MODEL, Stack, http_get, wait_for

HELLO = {"model": MODEL, "input": "hello world"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One service and the gateway, for tests that leave them as they were."""
    with Stack(tmp_path_factory.mktemp("faults"), {"SF_AUTH": "false"}) as running:
        running.serve()
        running.gateway()
        yield running


def metric(port: int, name: str) -> float:
    """Sum over the labels of one metric of a service."""
    _, text = http_get(port, "/metrics")
    lines = [line for line in text.decode().splitlines() if line.startswith((name + " ", name + "{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def assert_documented(load: Load, *codes: str) -> None:
    """Every failure has the documented body and says when to come back."""
    for _, headers, body in load.failures:
        document = json.loads(body)
        assert set(document) == {"detail", "code", "request_id", "error"}
        assert document["code"] in codes
        assert float(headers["retry-after"]) > 0


def test_four_times_the_callers_of_a_key(stack: Stack) -> None:
    tiers = json.dumps({"four": {"concurrency": 4}})
    stack.settings = {"SF_AUTH": "true", "SF_TIERS": tiers, "SF_DEFAULT_TIER": "four"}
    stack.serve()
    stack.gateway()
    headers = {"authorization": f"Bearer {stack.create_key()}"}
    with Load(stack.http_port, 16, headers) as load:
        load.wait_for(200, 100)
        load.wait_for(429, 100)
    assert set(load.outcomes) == {200, 429}
    assert_documented(load, "RATE_CONCURRENCY_LIMIT_EXCEEDED")
    with Load(stack.http_port, 4, headers) as load:
        load.wait_for(200, 100)
    assert set(load.outcomes) == {200}


def test_more_than_the_queue_holds(stack: Stack) -> None:
    stack.settings = {"SF_AUTH": "false", "SF_MAX_QUEUE_TOKENS": "1000"}
    stack.serve()
    stack.gateway()
    with Load(stack.http_port, 16, text="word " * 300) as load:
        load.wait_for(503, 20)
        load.wait_for(200, 20)
    assert set(load.outcomes) == {200, 503}
    assert_documented(load, "SERVICE_UNAVAILABLE")
    assert post(stack.http_port, HELLO).status == 200


def test_a_service_that_is_killed_and_comes_back(stack: Stack) -> None:
    services = stack.serve()
    stack.gateway()
    services.command.kill()
    answer = post(stack.http_port, HELLO)
    assert answer.error() == (503, "SERVICE_UNAVAILABLE")
    assert "retry-after" in answer.headers
    assert get(stack.http_port, "/ready").error() == (503, "SERVICE_UNAVAILABLE")
    assert get(stack.http_port, "/live").status == 200
    services.restart()
    wait_for(lambda: get(stack.http_port, "/ready").status == 200)
    assert post(stack.http_port, HELLO).status == 200


def test_a_service_of_two_that_stops_under_load_loses_nothing(stack: Stack) -> None:
    stack.settings = {"SF_AUTH": "false", "SF_DRAIN_SECONDS": "2"}
    first, second = stack.serve(), stack.serve()
    pool = stack.pool(first, "both") | {"addresses": [first.address, second.address]}
    stack.gateway({"pools": [pool]})
    with Load(stack.http_port, 8) as load:
        load.wait_for(200, 50)
        first.command.signal(signal.SIGTERM)
        assert first.command.wait() == 0
        load.wait_for(200, 50)
    assert set(load.outcomes) == {200}


def test_a_gateway_that_stops_under_load_loses_nothing(stack: Stack) -> None:
    stack.serve()
    gateway = stack.gateway({"timeouts": {"drain": 1}})
    with Load(stack.http_port, 8) as load:
        load.wait_for(200, 50)
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
    assert set(load.outcomes) <= {200, REFUSED}
    assert not load.outcomes[LOST]


def test_callers_who_leave_cost_nothing_more(shared: Stack) -> None:
    texts = ["word " * 200] * 2000
    body = json.dumps({"model": MODEL, "input": texts}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", shared.http_port)) as leaver:
        leaver.sendall(head + body)
        wait_for(lambda: metric(shared.services[0].metrics_port, "searchfoundation_queue_tokens") > 0)
    wait_for(lambda: metric(shared.services[0].metrics_port, "searchfoundation_queue_tokens") == 0)
    assert metric(shared.services[0].metrics_port, "searchfoundation_dropped_items_total") > 0
    assert post(shared.http_port, HELLO).status == 200


def test_a_caller_who_leaves_while_sending(shared: Stack) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", shared.http_port)) as leaver:
            leaver.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    assert post(shared.http_port, HELLO).status == 200


def test_a_slow_caller_does_not_hold_up_the_others(shared: Stack) -> None:
    body = json.dumps(HELLO).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", shared.http_port), timeout=100) as slow:
        for index in range(0, len(head + body), 20):
            slow.sendall((head + body)[index : index + 20])
            assert post(shared.http_port, HELLO).status == 200
        assert slow.recv(64).startswith(b"HTTP/1.1 200 OK")


def test_a_caller_who_reads_slowly(shared: Stack) -> None:
    body = json.dumps({"model": MODEL, "input": ["x"] * 2000}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    received = 0
    with socket.create_connection(("127.0.0.1", shared.http_port), timeout=100) as slow:
        slow.sendall(head.encode() + body)
        for _ in range(5):
            received += len(slow.recv(1000))
            assert post(shared.http_port, HELLO).status == 200
        while part := slow.recv(1 << 20):
            received += len(part)
    assert received > 8_000_000


def test_an_answer_that_takes_too_long(stack: Stack) -> None:
    stack.settings = {"SF_AUTH": "false", "SF_REQUEST_TIMEOUT_SECONDS": "0.3"}
    stack.serve()
    stack.gateway()
    answer = post(stack.http_port, {"model": MODEL, "input": ["word " * 250] * 2000})
    assert answer.error() == (504, "SERVICE_TIMEOUT")
    assert "0.3 seconds" in answer.json["detail"]
    wait_for(lambda: post(stack.http_port, HELLO).status == 200)


def pools_by_request(stack: Stack) -> dict[str, str]:
    return {entry["request_id"]: entry["pool"] for entry in stack.access_log()}


def test_two_pools_with_their_own_models(stack: Stack) -> None:
    aliases = json.dumps({"small": MODEL, "other": MODEL})
    stack.settings = {"SF_AUTH": "false", "SF_MODEL_ALIASES": aliases}
    stack.serve(models=("small",))
    stack.serve(models=("other",))
    stack.gateway()
    asked = [("small", "pool-0"), ("other", "pool-1"), ("jina-ai/other", "pool-1")]
    answers = [post(stack.http_port, {"model": model, "input": "x"}) for model, _ in asked]
    assert [answer.status for answer in answers] == [200] * 3
    names = [answer.headers["x-request-id"] for answer in answers]
    wait_for(lambda: pools_by_request(stack).keys() >= set(names))
    assert [pools_by_request(stack)[name] for name in names] == [pool for _, pool in asked]
    assert post(stack.http_port, {"model": "third", "input": "x"}).error() == (400, "INPUT_MODEL_NOT_FOUND")
    stack.services[1].command.kill()
    answer = post(stack.http_port, {"model": "other", "input": "x"})
    assert answer.error() == (503, "SERVICE_UNAVAILABLE")
    assert post(stack.http_port, {"model": "small", "input": "x"}).status == 200


@pytest.mark.parametrize("workers", [2])
def test_several_workers_behind_one_port(stack: Stack, workers: int) -> None:
    stack.settings = {"SF_AUTH": "false", "SF_WORKERS": str(workers)}
    stack.serve()
    stack.gateway()
    with Load(stack.http_port, 4) as load:
        load.wait_for(200, 50)
    assert set(load.outcomes) == {200}

"""The stack as it is deployed: TLS on every connection, Redis behind the limits."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.certificates import Certificates
from tests.gateway.client import get, post
from tests.servers import RedisServer, free_port, start_redis
from tests.stack import MODEL, Stack, wait_for

HELLO = {"model": MODEL, "input": "hello world"}


def test_tls_in_front_and_mutual_tls_behind(stack: Stack, tmp_path: Path) -> None:
    authority = Certificates(tmp_path)
    service, gateway = authority.make("service"), authority.make("gateway")
    stack.serve(
        SF_TLS_CERT=str(service.certificate),
        SF_TLS_KEY=str(service.key),
        SF_TLS_CLIENT_CA=str(authority.ca),
    )
    port = free_port()
    pair = {"certificate": str(gateway.certificate), "private_key": str(gateway.key)}
    stack.gateway(
        {"listener": {"port": port, "tls": pair}, "services_tls": {"ca": str(authority.ca), **pair}},
        http_port=port,
    )
    trust = ssl.create_default_context(cafile=authority.ca)
    connection = http.client.HTTPSConnection("localhost", port, context=trust, timeout=100)
    connection.request("POST", "/v1/embeddings", json.dumps(HELLO))
    assert connection.getresponse().status == 200
    connection.close()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = start_redis(folder)
    yield server
    server.stop()


def test_readiness_tells_of_redis_away_and_calls_go_on(stack: Stack, redis: RedisServer) -> None:
    tiers = json.dumps({"some": {"requests_per_minute": 1000}})
    stack.settings = {
        "SF_REDIS_URL": redis.url,
        "SF_AUTH": "false",
        "SF_TIERS": tiers,
        "SF_DEFAULT_TIER": "some",
    }
    stack.serve()
    stack.gateway()
    assert get(stack.http_port, "/ready").json["checks"]["pool-0"]["checks"]["redis"] == "ok"
    redis.stop()
    wait_for(lambda: get(stack.http_port, "/ready").json["status"] == "degraded")
    answer = get(stack.http_port, "/ready")
    assert answer.status == 200
    assert answer.json["checks"]["pool-0"]["checks"]["redis"].startswith("unavailable")
    # Limits are kept in the process meanwhile.
    assert post(stack.http_port, HELLO).status == 200
    redis.start()
    wait_for(lambda: get(stack.http_port, "/ready").json["status"] == "ok")

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.gateway.scripted import ScriptedService
from tests.stack import MODEL, Stack

OTHER_MODEL = "jina-embeddings-v3"

StartGateway = Callable[..., Stack]


def pool(service: ScriptedService, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    return {
        "name": service.name,
        "capabilities": ["embed"],
        "models": [model],
        "addresses": [service.address],
        **fields,
    }


def _gateways(factory: pytest.TempPathFactory, stack: ExitStack) -> StartGateway:
    def start(
        *pools: dict[str, Any],
        http_port: int = 0,
        ready: bool = True,
        settings: dict[str, str] | None = None,
        **topology: Any,
    ) -> Stack:
        running = stack.enter_context(Stack(factory.mktemp("gateway"), settings or {}))
        running.gateway({"pools": list(pools), **topology}, http_port=http_port, ready=ready)
        return running

    return start


@pytest.fixture(scope="module")
def service() -> Iterator[ScriptedService]:
    scripted = ScriptedService("scripted")
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture(autouse=True)
def _forget_calls(request: pytest.FixtureRequest) -> None:
    if "service" in request.fixturenames:
        service = request.getfixturevalue("service")
        service.calls.clear()
        service.unknown.clear()


@pytest.fixture
def start_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Starts gateways of one test's own."""
    with ExitStack() as stack:
        yield _gateways(tmp_path_factory, stack)


@pytest.fixture(scope="module")
def shared_gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Starts gateways that live as long as the module."""
    with ExitStack() as stack:
        yield _gateways(tmp_path_factory, stack)


@pytest.fixture(scope="module")
def port(shared_gateways: StartGateway, service: ScriptedService) -> int:
    """Port of a gateway with one pool and the default topology."""
    return shared_gateways(pool(service)).http_port

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from services.core.media.connecting import resolve
from services.core.media.fetching import Fetcher, FetchLimits
from services.core.settings import Settings

QUICK = FetchLimits(connect_seconds=5.0, idle_seconds=5.0, total_seconds=10.0)


class Names:
    """A resolver with names of its own; a list of answers is used up one by one, the last one stays."""

    def __init__(self) -> None:
        self.known: dict[str, list[Sequence[str]]] = {}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.known:
            if not host.replace(".", "").isalpha():
                return await resolve(host, port)
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        answers = self.known[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture
async def make(names: Names) -> AsyncIterator[Callable[..., Fetcher]]:
    made: list[Fetcher] = []

    def fetcher(*networks: str, limits: FetchLimits = QUICK) -> Fetcher:
        settings = Settings(fetch_allow_networks=networks)  # type: ignore[arg-type]
        made.append(Fetcher(settings, limits=limits, resolver=names))
        return made[-1]

    yield fetcher
    for one in made:
        await one.aclose()


@pytest.fixture
def local(make: Callable[..., Fetcher]) -> Fetcher:
    """A fetcher that may go to the servers of these tests."""
    return make("127.0.0.0/30", "::1/128")

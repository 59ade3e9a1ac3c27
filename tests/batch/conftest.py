"""Vectors to compare with, from an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.core.call import Call
from services.core.catalog import Catalog
from services.core.inference import EmbedOptions, Engine, finish
from services.core.settings import Settings
from tests.batch import expected
from tests.batch.process import MODEL, Client, Worker

Expect = Callable[..., bytes]


@pytest.fixture(scope="session")
def expect() -> Expect:
    """Give the output file of a job for ``expected.texts``."""
    known: dict[int, Any] = {}

    def write(job_id: str, count: int, leave_out: tuple[int, ...] = ()) -> bytes:
        if count not in known:
            known[count] = asyncio.run(_embedded(expected.texts(count)))
        vectors, tokens = known[count]
        return expected.output(job_id, MODEL, vectors, tokens, leave_out)

    return write


async def _embedded(texts: list[str]) -> tuple[Any, list[int]]:
    engine = await Engine.start(Settings(models=(MODEL,), auth=False), Catalog.load())
    try:
        raw = await engine.embedder(MODEL).embed(texts, EmbedOptions(), Call("expected"))
        return finish(raw.vectors), raw.token_counts
    finally:
        await engine.stop(5.0)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Make workers that share a folder; they end with the test."""
    made: list[Worker] = []

    def make(name: str = "worker", poisoned: bool = False, **settings: str) -> Worker:
        worker = Worker(tmp_path, settings, name, poisoned)
        made.append(worker)
        worker.start()
        return worker

    yield make
    for worker in made:
        worker.stop()


__all__ = ["Client"]

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.client import Answer, post
from tests.stack import MODEL, Stack


@dataclass(frozen=True)
class Api:
    """A running stack and a key to it."""

    stack: Stack
    key: str

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def embed(self, input: Any = "hello world", *, model: Any = MODEL, **fields: Any) -> Answer:
        return self.post({"model": model, "input": input, **fields})

    def rerank(self, query: Any, documents: Any, *, model: Any = MODEL, **fields: Any) -> Answer:
        body = {"model": model, "query": query, "documents": documents, **fields}
        return self.post(body, "/v1/rerank")

    def classify(self, **fields: Any) -> Answer:
        return self.post({"input": "hello world", **fields}, "/v1/classify")

    def train(self, **fields: Any) -> Answer:
        return self.post(fields, "/v1/train")

    def post(self, body: Any, path: str = "/v1/embeddings") -> Answer:
        return post(self.stack.http_port, body, self.authorization, path)


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service and the gateway, with default settings and a key."""
    with Stack(tmp_path_factory.mktemp("e2e")) as stack:
        stack.serve("embed", "rerank", "classify")
        stack.gateway()
        yield Api(stack, stack.create_key())


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Processes of one test's own, without keys."""
    with Stack(tmp_path, {"SF_AUTH": "false"}) as own:
        yield own

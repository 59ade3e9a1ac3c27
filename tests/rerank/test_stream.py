"""RerankStream: the same ranking of documents that come one after the other, and what ends a stream early."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from searchfoundation.v1 import common_pb2, rerank_pb2

from services.core.errors import ErrorCode, ServiceError
from services.rerank.grpc import RerankServicer, RerankStreamLimits
from services.rerank.logic import Reranker
from services.rerank.parsing import RequestParser
from tests.rerank.conftest import Rig
from tests.rig import MINILM, detail

pytestmark = pytest.mark.asyncio(loop_scope="module")

Message = rerank_pb2.RerankStreamRequest
QUERY = common_pb2.Content(text="where does the river end")
TEXTS = [f"stone number {n} lies in the river" for n in range(57)]


def start(model: str = MINILM, **options: Any) -> Message:
    return Message(
        start=rerank_pb2.RerankStart(model=model, query=QUERY, options=rerank_pb2.RerankOptions(**options))
    )


def documents(*texts: str) -> Message:
    contents = [common_pb2.Content(text=text) for text in texts]
    return Message(documents=rerank_pb2.RerankDocuments(documents=contents))


async def each(items: Iterable[Message]) -> AsyncIterator[Message]:
    for item in items:
        yield item


async def send(rig: Rig, *messages: Message, **arguments: Any) -> rerank_pb2.RerankResponse:
    return await rig.typed.RerankStream(each(messages), **arguments)


async def failure(rig: Rig, *messages: Message, **arguments: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(rig, *messages, **arguments)
    return caught.value


async def fields(rig: Rig, *messages: Message) -> list[str]:
    error = await failure(rig, *messages)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return [v.field for v in detail(error, error_details_pb2.BadRequest).field_violations]


@pytest.mark.parametrize("size", [1, 10, 57])
async def test_a_stream_ranks_as_a_single_call_does(rig: Rig, size: int) -> None:
    whole = await rig.typed.Rerank(
        rerank_pb2.RerankRequest(
            model=MINILM,
            query=QUERY,
            documents=[common_pb2.Content(text=text) for text in TEXTS],
            options=rerank_pb2.RerankOptions(top_n=9),
        )
    )
    parts = [documents(*TEXTS[n : n + size]) for n in range(0, len(TEXTS), size)]
    streamed = await send(rig, start(top_n=9), *parts)
    assert [(r.index, r.document.text) for r in streamed.results] == [
        (r.index, r.document.text) for r in whole.results
    ]
    assert [r.relevance_score for r in streamed.results] == pytest.approx(
        [r.relevance_score for r in whole.results], abs=1e-6
    )
    assert len(streamed.results) == 9
    assert streamed.usage == whole.usage
    assert rig.access.charged == [whole.usage.total_tokens] * 2


async def test_options_hold_for_the_whole_stream(rig: Rig) -> None:
    response = await send(
        rig, start(return_documents=False, return_embeddings=True), documents("a"), Message(), documents("b")
    )
    assert [r.HasField("document") for r in response.results] == [False, False]
    assert [r.embedding.dimensions for r in response.results] == [384, 384]


async def test_the_start_comes_first_and_once(rig: Rig) -> None:
    assert await fields(rig) == ["start"]
    assert await fields(rig, documents("a")) == ["start"]
    assert await fields(rig, start(), documents("a"), start()) == ["start"]


async def test_documents_are_needed(rig: Rig) -> None:
    assert await fields(rig, start()) == ["documents"]
    assert await fields(rig, start(), documents()) == ["documents"]


async def test_bad_documents_are_counted_over_all_messages(rig: Rig) -> None:
    bad = Message(
        documents=rerank_pb2.RerankDocuments(
            documents=[common_pb2.Content(text="b"), common_pb2.Content(image=common_pb2.Media(data=b"x"))]
        )
    )
    assert await fields(rig, start(), documents("a"), bad) == ["documents[2]"]


async def test_a_wrong_start_ends_the_stream_before_any_document(rig: Rig) -> None:
    taken = 0

    async def messages(first: Message) -> AsyncIterator[Message]:
        nonlocal taken
        yield first
        while True:
            taken += 1
            yield documents("stone")
            await asyncio.sleep(0.02)

    for first, field in (
        (start(top_n=0), "start.options.top_n"),
        (Message(start=rerank_pb2.RerankStart()), "start.model"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.typed.RerankStream(messages(first))
        violations = detail(caught.value, error_details_pb2.BadRequest).field_violations
        assert [violation.field for violation in violations] == [field]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.RerankStream(messages(start("jina-reranker-v3")))
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "INPUT_MODEL_NOT_FOUND"
    assert taken < 100


async def test_too_many_documents_end_an_endless_stream(rig: Rig) -> None:
    async def endless() -> AsyncIterator[Message]:
        yield start()
        while True:
            yield documents(*TEXTS)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.RerankStream(endless())
    (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == (
        "documents",
        "A request can contain at most 400 documents.",
    )
    assert rig.access.charged == []


async def test_too_many_bytes_end_an_endless_stream(rig: Rig) -> None:
    async def endless() -> AsyncIterator[Message]:
        yield start()
        for _ in range(18):
            yield documents("stone " * 10_000)
        # The last of them was too much. Of a message that is on its way when the stream ends, gRPC's client
        # may tell instead of why.
        await asyncio.Event().wait()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.RerankStream(endless())
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "INPUT_TOO_LARGE"
    assert "1048576 bytes" in str(caught.value.details())


async def test_a_deadline_spans_the_stream(rig: Rig) -> None:
    async def slow() -> AsyncIterator[Message]:
        yield start()
        await asyncio.sleep(60)
        yield documents("never")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.typed.RerankStream(slow(), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_without_a_deadline_the_servers_holds(rig: Rig) -> None:
    """A sender who never ends is not waited for."""
    from services.core.call import Call, current_call
    from tests.rerank.test_requests import CATALOG

    async def silent() -> AsyncIterator[Message]:
        yield start()
        await asyncio.sleep(60)

    parser = RequestParser(CATALOG, rig.engine.served, max_documents=8)
    servicer = RerankServicer(parser, Reranker(rig.engine), RerankStreamLimits(8, 1 << 20, 0.05))
    current_call.set(Call("test"))
    with pytest.raises(ServiceError) as caught:
        await servicer.RerankStream(silent(), None)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.SERVICE_TIMEOUT
    assert "0.05 seconds" in caught.value.detail


async def test_nothing_stays_behind_when_the_caller_leaves(rig: Rig) -> None:
    before = asyncio.all_tasks()
    call = rig.typed.RerankStream()
    await call.write(start())
    await call.write(documents(*TEXTS))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for _ in range(200):
        left = {task for task in asyncio.all_tasks() - before if "Rerank" in repr(task)}
        if not left:
            break
        await asyncio.sleep(0.01)
    assert not left
    assert len((await send(rig, start(), documents("a", "b"))).results) == 2

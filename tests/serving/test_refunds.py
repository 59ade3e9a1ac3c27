"""What a key pays for calls that fail on our side, by its balance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
import pytest_asyncio
import torch
from google.api.httpbody_pb2 import HttpBody
from searchfoundation.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    chat_rest_pb2_grpc,
    common_pb2,
    embed_pb2,
    embed_pb2_grpc,
    rerank_pb2,
    rerank_pb2_grpc,
)

from services.chat.capability import build as build_chat
from services.core.access import AccessControl
from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.inference import Engine
from services.core.inference.loading import load_model
from services.core.serving.server import Server
from services.core.settings import Settings
from services.embed.capability import build as build_embed
from services.rerank.capability import build as build_rerank
from tests.rig import MINILM, settings
from tests.vlm_served import CACHE_BYTES, ENDLESS, write_answering

pytestmark = pytest.mark.asyncio(loop_scope="module")

BALANCE = 1_000_000


@dataclass
class Passes:
    """Lets passes of the networks through, and counts them; from pass ``last`` on, if any, each fails."""

    count: int = 0
    last: int | None = None

    def enter(self) -> None:
        self.count += 1
        if self.last is not None and self.count > self.last:
            raise RuntimeError("the network is broken")


@dataclass
class _Breakable:
    """A network whose passes go through ``Passes``."""

    network: Any
    passes: Passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def forward(self, batch: Any) -> Any:
        self.passes.enter()
        return self.network.forward(batch)

    def step(self, chunks: Any) -> torch.Tensor:
        self.passes.enter()
        return self.network.step(chunks)


@dataclass
class House:
    """A server in this process, a key with a balance, and what breaks its networks."""

    engine: Engine
    access: AccessControl
    channel: grpc.aio.Channel
    key_id: str
    metadata: tuple[tuple[str, str], ...]
    passes: Passes = field(default_factory=Passes)

    async def spent(self) -> int:
        """Tokens taken off the balance, all that is over being written."""
        assert self.access.keys is not None
        assert self.access._ledger is not None
        await self.access._ledger.flush()
        return await self.access.keys.spent(self.key_id) or 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder: Path = write_answering(tmp_path_factory.mktemp("refunds"))
    chosen = settings(
        models=(MINILM, ENDLESS),
        model_dir=folder,
        data_dir=tmp_path_factory.mktemp("keys"),
        auth=True,
        chat_cache_bytes=CACHE_BYTES,
    )
    catalog, passes = Catalog.load(folder / "catalog.yaml"), Passes()

    def load(spec: ModelSpec, values: Settings, device: torch.device) -> Any:
        return _Breakable(load_model(spec, values, device), passes)

    engine = await Engine.start(chosen, catalog, load=load)
    access = await AccessControl.open(chosen)
    assert access.keys is not None
    key, record = await access.keys.create(tier="unlimited", balance=BALANCE)
    served = [build(engine, catalog, chosen) for build in (build_chat, build_embed, build_rerank)]
    server = Server(chosen, served, engine, access)
    await server.start()
    metadata = (("authorization", f"Bearer {key}"),)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield House(engine, access, channel, record.id, metadata, passes)
    finally:
        await server.stop(drain=False)
        await access.close()
        await engine.stop(5.0)


@asynccontextmanager
async def breaking(house: House, after: int = 0) -> AsyncIterator[None]:
    """Have every pass fail but the first ``after``."""
    house.passes.last = house.passes.count + after
    try:
        yield
    finally:
        house.passes.last = None


def question(**options: Any) -> chat_pb2.ChatRequest:
    message = chat_pb2.ChatMessage(role="user", parts=[common_pb2.ContentPart(text="hello")])
    return chat_pb2.ChatRequest(
        model=ENDLESS, messages=[message], options=chat_pb2.ChatOptions(max_tokens=3000, **options)
    )


def body(**fields: Any) -> HttpBody:
    asked = {"model": ENDLESS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3000}
    return HttpBody(content_type="application/json", data=orjson.dumps(asked | fields))


def text(written: str) -> common_pb2.Content:
    return common_pb2.Content(text=written)


async def all_before_failure(call: Any) -> list[Any]:
    """Return the messages of a stream that ends with an error of ours."""
    found: list[Any] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for message in call:
            found.append(message)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    return found


async def prompt_tokens(house: House) -> int:
    answer = await chat_pb2_grpc.ChatServiceStub(house.channel).Complete(
        chat_pb2.ChatRequest(
            model=ENDLESS, messages=question().messages, options=chat_pb2.ChatOptions(max_tokens=1)
        ),
        metadata=house.metadata,
    )
    return answer.usage.prompt_tokens


@pytest.mark.parametrize("door", ["embed", "rerank", "ranked stream", "chat", "chat over REST"])
async def test_an_answer_in_one_piece_that_fails_costs_nothing(whole: House, door: str) -> None:
    house = whole
    channel, metadata = house.channel, house.metadata

    async def documents() -> AsyncIterator[rerank_pb2.RerankStreamRequest]:
        start = rerank_pb2.RerankStart(model=MINILM, query=text("river"))
        yield rerank_pb2.RerankStreamRequest(start=start)
        more = rerank_pb2.RerankDocuments(documents=[text("stone"), text("bread")])
        yield rerank_pb2.RerankStreamRequest(documents=more)

    async def ask() -> None:
        if door == "embed":
            request = embed_pb2.EmbedRequest(model=MINILM, inputs=[text("hello")])
            await embed_pb2_grpc.EmbedServiceStub(channel).Embed(request, metadata=metadata)
        elif door == "rerank":
            ranked = rerank_pb2.RerankRequest(model=MINILM, query=text("river"), documents=[text("stone")])
            await rerank_pb2_grpc.RerankServiceStub(channel).Rerank(ranked, metadata=metadata)
        elif door == "ranked stream":
            await rerank_pb2_grpc.RerankServiceStub(channel).RerankStream(documents(), metadata=metadata)
        elif door == "chat":
            await chat_pb2_grpc.ChatServiceStub(channel).Complete(question(), metadata=metadata)
        else:
            call = chat_rest_pb2_grpc.ChatRestServiceStub(channel).ChatCompletions(body(), metadata=metadata)
            assert [each async for each in call] == []

    before = await house.spent()
    async with breaking(house, after=40 if door.startswith("chat") else 0):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert await house.spent() == before


@pytest.mark.parametrize("door", ["typed", "REST"])
async def test_of_a_stream_that_fails_what_was_sent_is_paid(whole: House, door: str) -> None:
    house = whole
    prompt = await prompt_tokens(house)
    before = await house.spent()
    async with breaking(house, after=40):
        if door == "typed":
            stub = chat_pb2_grpc.ChatServiceStub(house.channel)
            chunks = await all_before_failure(stub.CompleteStream(question(), metadata=house.metadata))
            said = "".join(chunk.text for chunk in chunks)
        else:
            rest = chat_rest_pb2_grpc.ChatRestServiceStub(house.channel)
            lines = await all_before_failure(rest.ChatCompletions(body(stream=True), metadata=house.metadata))
            *events, failure = [orjson.loads(line.data.removeprefix(b"data: ")) for line in lines]
            said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            assert failure["error"]["code"] == "internal_error"
    assert 30 < len(said) <= 40
    assert await house.spent() == before + prompt + len(said)


async def test_of_a_stream_that_fails_before_its_first_token_nothing_is_paid(whole: House) -> None:
    before = await whole.spent()
    async with breaking(whole):
        stub = chat_pb2_grpc.ChatServiceStub(whole.channel)
        assert await all_before_failure(stub.CompleteStream(question(), metadata=whole.metadata)) == []
    assert await whole.spent() == before


async def test_a_stream_that_its_caller_leaves_is_paid_as_far_as_it_was_made(whole: House) -> None:
    house = whole
    prompt = await prompt_tokens(house)
    before, passes = await house.spent(), house.passes.count
    call = chat_pb2_grpc.ChatServiceStub(house.channel).CompleteStream(question(), metadata=house.metadata)
    for _ in range(20):
        await call.read()
    call.cancel()
    pool = house.engine.chat(ENDLESS)._generation.pool
    assert pool is not None
    async with asyncio.timeout(60):
        while pool.available < pool.count:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.01)
        # The first pass reads the prompt and makes the first token; the last may have been for nobody.
        made = house.passes.count - passes
        while (paid := await house.spent() - before - prompt) < made - 1:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
    assert 20 <= made - 1 <= paid <= made


async def test_a_message_of_a_stream_that_fails_costs_nothing_and_the_others_their_tokens(
    whole: House,
) -> None:
    house = whole
    stub = embed_pb2_grpc.EmbedServiceStub(house.channel)
    before = await house.spent()
    call = stub.EmbedStream(metadata=house.metadata)
    answers: list[Any] = []
    for broken in (False, True, False):
        house.passes.last = house.passes.count if broken else None
        await call.write(embed_pb2.EmbedStreamRequest(model=MINILM, input=text("hello world")))
        answers.append(await call.read())
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    assert [answer.WhichOneof("outcome") for answer in answers] == ["result", "error", "result"]
    tokens = [answer.result.usage.total_tokens for answer in answers]
    assert await house.spent() == before + sum(tokens)
    assert tokens[0] == tokens[2] > 0

"""Messages that are right by type and wrong by content are answered or refused in words, by every method."""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from searchfoundation import v1
from searchfoundation.v1 import batch_pb2, classify_pb2, common_pb2, embed_pb2, rerank_pb2

from services.core.catalog.types import Capability
from tests.stack import MODEL, Services, Stack

SERVED = ("embed", "rerank", "classify", "batch")
FAULTS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.DATA_LOSS,
}
CLIENTS_OWN = "Internal error from Core"
"""What grpc.aio's client says of a stream that the server ended while it was writing. Its status is lost."""

ENDED = "ENDED WHILE IT WAS WRITTEN"

AT_ONCE = 16
TEXTS = ("", "a", MODEL, "hello world", "\0", "é😀", " " * 300, "x" * 3000, "-1", "7", "\u2028", "%00/..")
NUMBERS = (0, 1, 2, 7, 384, 385, 2**31 - 1)

_TEXT = common_pb2.Content(text="a fox")
_LINES = batch_pb2.BatchLines(lines=[batch_pb2.BatchLine(custom_id="a", inputs=[_TEXT])])
_EXAMPLES = [
    classify_pb2.TrainingExample(content=_TEXT, label="fox"),
    classify_pb2.TrainingExample(content=common_pb2.Content(text="a dog"), label="dog"),
]
GOOD: dict[str, Message] = {
    message.DESCRIPTOR.full_name: message
    for message in (
        embed_pb2.EmbedRequest(model=MODEL, inputs=[_TEXT]),
        embed_pb2.EmbedStreamRequest(id="1", model=MODEL, input=_TEXT),
        rerank_pb2.RerankRequest(model=MODEL, query=_TEXT, documents=[_TEXT]),
        rerank_pb2.RerankStreamRequest(start=rerank_pb2.RerankStart(model=MODEL, query=_TEXT)),
        classify_pb2.ClassifyRequest(model=MODEL, inputs=[_TEXT], labels=["fox", "dog"]),
        classify_pb2.TrainRequest(model=MODEL, examples=_EXAMPLES),
        batch_pb2.CreateBatchRequest(model=MODEL, input=_LINES),
    )
}
"""Where something can be done with a message that a chance of fields would hardly ever make."""

BODIES: dict[str, dict[str, Any]] = {
    "CreateEmbeddings": {"model": MODEL, "input": ["a fox"], "truncate": True},
    "CohereEmbed": {
        "model": MODEL,
        "texts": ["a fox"],
        "input_type": "search_document",
        "embedding_types": ["float"],
    },
    "CohereEmbedV1": {"model": MODEL, "texts": ["a fox"], "input_type": "search_query"},
    "TeiEmbed": {"inputs": ["a fox"], "normalize": True, "truncate": True},
    "TeiEmbedAll": {"inputs": ["a fox"]},
    "TeiSimilarity": {"inputs": {"source_sentence": "a fox", "sentences": ["a dog", "a cat"]}},
    "OllamaEmbed": {"model": MODEL, "input": "a fox", "keep_alive": "5m"},
    "OllamaEmbedOne": {"model": MODEL, "prompt": "a fox"},
    "OllamaShow": {"model": MODEL},
    "Rerank": {"model": MODEL, "query": "q", "documents": ["a", {"text": "b"}], "return_documents": True},
    "CohereRerank": {"model": MODEL, "query": "q", "documents": ["a", "b"], "top_n": 1},
    "CohereRerankV1": {"model": MODEL, "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1},
    "TeiRerank": {"query": "q", "texts": ["a", "b"], "return_text": True},
    "Classify": {"model": MODEL, "input": ["a fox"], "labels": ["fox", "dog"]},
    "Train": {"model": MODEL, "input": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]},
    "CreateBatch": {"model": MODEL, "input": [{"custom_id": "a", "body": {"input": "a fox"}}]},
    "CreateOpenAIBatch": {
        "input_file_id": "file-x",
        "endpoint": "/v1/embeddings",
        "completion_window": "24h",
    },
}
"""Good bodies of REST calls, by method, which are then changed."""

VALUES = (
    None,
    True,
    -1,
    2**63,
    1.5,
    "",
    "x" * 300,
    "\0",
    [],
    [[]],
    {},
    {"text": 1},
    [None] * 3,
    {"a": {"b": []}},
)


def methods() -> Iterator[MethodDescriptor]:
    """All methods of all services of the contract, but for those of capabilities that are not served here."""
    absent = set(map(str, Capability)) - set(SERVED)
    for found in pkgutil.iter_modules(v1.__path__):
        if found.name.endswith("_pb2") and found.name.partition("_")[0] not in absent:
            file = importlib.import_module(f"{v1.__name__}.{found.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                yield from service.methods


def request(method: MethodDescriptor, chance: random.Random) -> Message:
    """A message for a method: fields by chance, or a good message with some of its fields changed."""
    kind = GetMessageClass(method.input_type)
    if kind is HttpBody:
        return HttpBody(content_type="application/json", data=body(method.name, chance))
    good = GOOD.get(method.input_type.full_name)
    if good is None or chance.random() < 0.3:
        return filled(kind, chance)
    message = kind()
    message.CopyFrom(good)
    for _ in range(chance.randrange(3)):
        change(message, chance)
    return message


def body(name: str, chance: random.Random) -> bytes:
    value = dict(BODIES.get(name, {"model": MODEL, "input": "x"}))
    for _ in range(chance.randrange(3)):
        field = chance.choice([*value, "dimensions", "task", "labels", "top_n", "limit", "embedding_type"])
        if chance.random() < 0.3:
            value.pop(field, None)
        else:
            value[field] = chance.choice(VALUES)
    return json.dumps(value).encode()


def filled(kind: type[Message], chance: random.Random, depth: int = 0) -> Message:
    """A message of which each field is set or not, to something that its type allows."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if chance.random() > 0.4 and depth <= 4:
            fill(message, field, chance, depth)
    return message


def change(message: Message, chance: random.Random) -> None:
    """Change one field of a message, or of a message inside."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = chance.choice(fields)
    here: Any = getattr(message, field.name)
    if field.message_type is not None and chance.random() < 0.7:
        inside = list(here) if field.is_repeated else [here] if message.HasField(field.name) else []
        if inside:
            change(chance.choice(inside), chance)
            return
    message.ClearField(field.name)
    if chance.random() < 0.8:
        fill(message, field, chance, 2)


def fill(message: Message, field: FieldDescriptor, chance: random.Random, depth: int) -> None:
    holder: Any = getattr(message, field.name)
    if field.message_type is not None:
        holders = [holder.add() for _ in range(chance.randrange(4))] if field.is_repeated else [holder]
        for each in holders:
            each.CopyFrom(filled(type(each), chance, depth + 1))
    elif field.is_repeated:
        holder.extend(value(field, chance) for _ in range(chance.randrange(4)))
    else:
        setattr(message, field.name, value(field, chance))


def value(field: FieldDescriptor, chance: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return MODEL if field.name == "model" and chance.random() < 0.7 else chance.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.choice(TEXTS).encode()
    if field.type == FieldDescriptor.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return chance.choice((0.0, -1.5, float("inf"), float("nan")))
    return chance.choice(NUMBERS)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    with Stack(tmp_path_factory.mktemp("fuzz"), {"SF_AUTH": "false"}) as stack:
        yield stack.serve(*SERVED)


async def fuzz(
    channel: grpc.aio.Channel,
    method: MethodDescriptor,
    count: int,
    told: Counter[str],
    faults: list[str],
) -> None:
    """Send ``count`` messages to a method, several calls at a time, and count how the calls end."""
    chance = random.Random(method.full_name)
    path = f"/{method.containing_service.full_name}/{method.name}"
    arity = "stream" if method.client_streaming else "unary"
    answers = "stream" if method.server_streaming else "unary"
    open_call: Callable[..., Any] = getattr(channel, f"{arity}_{answers}")(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    left = count

    async def calls() -> None:
        nonlocal left
        while left > 0:
            messages = [
                request(method, chance) for _ in range(chance.randrange(1, 5) if arity == "stream" else 1)
            ]
            left -= len(messages)
            given = each(messages) if method.client_streaming else messages[0]
            call = open_call(given, timeout=120)
            try:
                if method.server_streaming:
                    async for _ in call:
                        pass
                else:
                    await call
                told["OK"] += 1
            except grpc.aio.AioRpcError as error:
                if error.details() == CLIENTS_OWN:
                    told[ENDED] += 1
                    continue
                told[error.code().name] += 1
                if error.code() in FAULTS:
                    faults.append(f"{path} {error.code().name} {error.details()} {messages}")

    await asyncio.gather(*(calls() for _ in range(AT_ONCE)))


async def each(messages: list[Message]) -> AsyncIterator[Message]:
    for message in messages:
        yield message


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(50, id="short"),
        pytest.param(10_000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(3600)]),
    ],
)
async def test_any_message_of_the_type_is_answered_or_refused(services: Services, count: int) -> None:
    told: dict[str, Counter[str]] = {}
    faults: list[str] = []
    async with grpc.aio.insecure_channel(services.address) as channel:
        for method in methods():
            await fuzz(channel, method, count, told.setdefault(method.full_name, Counter()), faults)
            services.command.must_run()
            print(f"{method.full_name:70} {dict(told[method.full_name])}", flush=True)
    assert not faults
    assert all(sum(codes.values()) > count // 5 for codes in told.values())
    names = (
        "EmbedService.Embed",
        "RerankService.Rerank",
        "ClassifyService.Classify",
        "ClassifyService.Train",
    )
    typed = [codes for name, codes in told.items() if name.endswith(names)]
    assert len(typed) == len(names)
    assert all({"OK", "INVALID_ARGUMENT"} <= set(codes) for codes in typed)
    log = services.command.text()
    assert '"level":"error"' not in log
    assert '"code":"INTERNAL_ERROR"' not in log
    print(len(told), "methods,", count, "messages each:", dict(sum(told.values(), Counter[str]())))

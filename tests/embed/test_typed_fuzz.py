"""Messages that are right by type and wrong by content are answered or refused in words, never a fault."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from searchfoundation.v1 import embed_pb2

from tests.embed.conftest import Rig
from tests.rig import MINILM

pytestmark = pytest.mark.asyncio(loop_scope="module")

FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
TEXTS = ("", "a", MINILM, "hello world", "\0", "é😀", " " * 300, "x" * 3000, "-1", "\u2028")
NUMBERS = (0, 1, 2, 7, 384, 385, 2**31 - 1)


def filled(kind: type[Message], chance: random.Random, depth: int = 0) -> Message:
    """A message of which each field is set or not, to something that its type allows."""
    message = kind()
    for field in kind.DESCRIPTOR.fields:
        if chance.random() < 0.4 or depth > 4:
            continue
        if field.message_type is not None:
            holder: Any = getattr(message, field.name)
            if not field.is_repeated:
                holder.CopyFrom(filled(type(holder), chance, depth + 1))
                continue
            for _ in range(chance.randrange(4)):
                added = holder.add()
                added.CopyFrom(filled(type(added), chance, depth + 1))
        elif field.is_repeated:
            getattr(message, field.name).extend(value(field, chance) for _ in range(chance.randrange(4)))
        else:
            setattr(message, field.name, value(field, chance))
    return message


def value(field: FieldDescriptor, chance: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return chance.choice(TEXTS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.choice(TEXTS).encode()
    if field.type == FieldDescriptor.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return chance.choice((0.0, -1.5, float("inf"), float("nan")))
    return chance.choice(NUMBERS)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(200, id="short"),
        pytest.param(10_000, id="long", marks=[pytest.mark.soak, pytest.mark.timeout(3000)]),
    ],
)
async def test_any_message_of_the_type_is_answered_or_refused(rig: Rig, count: int) -> None:
    chance = random.Random(12)
    told: set[grpc.StatusCode] = set()
    for _ in range(count):
        request = filled(embed_pb2.EmbedRequest, chance)
        if chance.random() < 0.7:
            request.model = MINILM
        try:
            await rig.typed.Embed(request, timeout=60)
            told.add(grpc.StatusCode.OK)
        except grpc.aio.AioRpcError as error:
            told.add(error.code())
    assert not told & FAULTS
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= told


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_any_stream_of_messages_is_answered_one_by_one(rig: Rig, count: int) -> None:
    chance = random.Random(13)

    async def messages() -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        for place in range(count):
            message = filled(embed_pb2.EmbedStreamRequest, chance)
            if place % 5 == 0:
                message.model = MINILM
            yield message

    codes = [
        response.error.code
        async for response in rig.typed.EmbedStream(messages())
        if response.HasField("error")
    ]
    assert not {code.value[0] for code in FAULTS} & set(codes)
    assert 0 < len(codes) <= count

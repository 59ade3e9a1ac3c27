"""The REST door: JSON bodies inside ``google.api.HttpBody``."""

from __future__ import annotations

from functools import partial
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import embed_rest_pb2_grpc

from services.core.call import current_call
from services.core.serving.rest import decode, encode, in_slices
from services.embed.encoding import json_rows
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.types import EmbedResult

Context = grpc.aio.ServicerContext[httpbody_pb2.HttpBody, httpbody_pb2.HttpBody]


class EmbedRestServicer(embed_rest_pb2_grpc.EmbedRestServiceServicer):
    """``EmbedRestService`` over the capability."""

    def __init__(self, parser: RequestParser, embedder: Embedder) -> None:
        self._parser = parser
        self._embedder = embedder

    async def CreateEmbeddings(  # noqa: N802 - named by the contract
        self, request: httpbody_pb2.HttpBody, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /v1/embeddings``."""
        parsed = self._parser.parse(decode(request))
        result = await self._embedder.embed(parsed, current_call.get())
        count, width = result.vectors.shape
        data = await in_slices(count, width * len(result.encodings), partial(response_items, result))
        return encode(response_body(result, data))


def response_body(result: EmbedResult, data: Any) -> dict[str, Any]:
    """Lay out the answer; keys stand in the order of the wire."""
    return {
        "model": result.model,
        "object": "list",
        "usage": {"total_tokens": result.total_tokens, "prompt_tokens": result.total_tokens},
        "data": data,
    }


def response_items(result: EmbedResult, first: int, last: int) -> list[dict[str, Any]]:
    """Lay out the vectors from ``first`` to before ``last``, in JSON values and numpy rows."""
    vectors = result.vectors[first:last]
    columns = {encoding: json_rows(vectors, encoding) for encoding in result.encodings}
    items: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": value}
        for index, value in enumerate(columns[result.encodings[0]], first)
    ]
    if len(columns) > 1:
        for row, item in enumerate(items):
            item["embeddings_by_type"] = {encoding.value: column[row] for encoding, column in columns.items()}
    return items

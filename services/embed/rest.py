"""The REST door: JSON bodies inside ``google.api.HttpBody``."""

from __future__ import annotations

from functools import partial
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import embed_rest_pb2_grpc

from services.core.call import current_call
from services.core.serving.rest import Body, decode, encode, in_slices
from services.embed.encoding import json_rows
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.types import EmbedResult, MultiVectorResult, Result, SparseResult

Context = grpc.aio.ServicerContext[httpbody_pb2.HttpBody, httpbody_pb2.HttpBody]


class EmbedRestServicer(embed_rest_pb2_grpc.EmbedRestServiceServicer):
    """``EmbedRestService`` over the capability."""

    def __init__(self, parser: RequestParser, embedder: Embedder) -> None:
        self._parser = parser
        self._embedder = embedder

    async def CreateEmbeddings(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /v1/embeddings``."""
        parsed = self._parser.parse(await decode(request))
        result = await self._embedder.embed(parsed, current_call.get())
        numbers = _numbers(result) // max(1, len(result.vectors))
        data = await in_slices(len(result.vectors), numbers, partial(response_items, result))
        return encode(response_body(result, data))


def _numbers(result: Result) -> int:
    """Count what is to be written."""
    if isinstance(result, SparseResult):
        return result.entries
    matrices = (result.vectors,) if isinstance(result, EmbedResult) else result.vectors
    return sum(matrix.size for matrix in matrices) * len(result.encodings)


def response_body(result: Result, data: Any) -> dict[str, Any]:
    """Lay out the answer; keys stand in the order of the wire."""
    return {"model": result.model, "object": "list", "usage": _usage(result), "data": data}


def _usage(result: Result) -> dict[str, int]:
    tokens = result.usage.total
    if isinstance(result, SparseResult):
        return {"total_tokens": tokens, "input_tokens": tokens, "output_tokens": result.entries}
    return {"total_tokens": tokens, "prompt_tokens": tokens, **result.usage.of_media}


def response_items(result: Result, first: int, last: int) -> list[dict[str, Any]]:
    """Lay out the vectors from ``first`` to before ``last``, in JSON values and numpy rows."""
    places = range(first, last)
    if isinstance(result, EmbedResult):
        return _dense_items(result, places)
    if isinstance(result, MultiVectorResult):
        return [_multi_item(result, place) for place in places]
    return [_sparse_item(result, place) for place in places]


def _dense_items(result: EmbedResult, places: range) -> list[dict[str, Any]]:
    vectors = result.vectors[places.start : places.stop]
    columns = {encoding: json_rows(vectors, encoding) for encoding in result.encodings}
    items: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": value}
        for index, value in zip(places, columns[result.encodings[0]], strict=True)
    ]
    if len(columns) > 1:
        for row, item in enumerate(items):
            item["embeddings_by_type"] = {encoding.value: column[row] for encoding, column in columns.items()}
    return items


def _multi_item(result: MultiVectorResult, place: int) -> dict[str, Any]:
    columns = {encoding: json_rows(result.vectors[place], encoding) for encoding in result.encodings}
    item: dict[str, Any] = {
        "object": "embeddings",
        "index": place,
        "embeddings": columns[result.encodings[0]],
    }
    if result.tokens is not None:
        item["tokenized_input"] = result.tokens[place]
    if len(columns) > 1:
        item["embeddings_by_type"] = {encoding.value: column for encoding, column in columns.items()}
    return item


def _sparse_item(result: SparseResult, place: int) -> dict[str, Any]:
    vector = result.vectors[place]
    weights = dict(zip(vector.tokens, vector.weights, strict=True))
    return {"object": "embedding", "index": place, "embedding": weights}

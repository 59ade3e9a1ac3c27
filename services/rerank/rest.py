"""The REST door: JSON bodies inside ``google.api.HttpBody``."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import grpc.aio
import orjson
from google.api import httpbody_pb2
from searchfoundation.v1 import rerank_rest_pb2_grpc

from services.core.call import current_call
from services.core.requests.defaults import DefaultModels
from services.core.serving.exchange import told_by_caller
from services.core.serving.rest import Body, decode, encode, in_slices, raw_items
from services.rerank.logic import Reranker
from services.rerank.parsing import RequestParser
from services.rerank.types import RerankResult
from services.rerank.vendors.cohere import V1_FIELDS
from services.rerank.vendors.rest import RerankVendorsServicer

Context = grpc.aio.ServicerContext[httpbody_pb2.HttpBody, httpbody_pb2.HttpBody]

_has_long_number = re.compile(rb"[0-9]{19}").search

_SDK = "x-fern-sdk-name"
"""Says whose client calls."""
_BYTES_OF_A_NUMBER = 8
"""About as long as a number takes, so many bytes of a string take to write."""


class RerankRestServicer(rerank_rest_pb2_grpc.RerankRestServiceServicer):
    """``RerankRestService`` over the capability.

    ``object_models`` are the ids of models whose results show a string document as ``{"text": ...}``.
    """

    def __init__(
        self,
        parser: RequestParser,
        reranker: Reranker,
        object_models: Collection[str],
        defaults: DefaultModels,
    ) -> None:
        self.vendors = RerankVendorsServicer(parser, reranker, defaults, self.ranking)
        self._parser = parser
        self._reranker = reranker
        self._object_models = object_models

    async def Rerank(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /v1/rerank``, a path of Cohere's first version as well."""
        sent = await decode(request, keep=True)
        if "cohere" in told_by_caller(_SDK) or not V1_FIELDS.isdisjoint(sent):
            return await self.vendors.cohere_v1(sent)
        return await self.ranking(request, sent)

    async def ranking(self, request: Body, fields: dict[str, Any]) -> httpbody_pb2.HttpBody:
        """Answer the fields of a body, whose bytes are still wanted, in our own form."""
        size = len(request.data)
        # Voyage's clients look for the results under another name; they spell this field so.
        voyage = "top_k" in fields
        parsed = self._parser.parse(fields)
        shown = None
        if parsed.return_documents:
            shown = self._shown(parsed.model, await _exact(request, fields["documents"]))
        del fields, request
        result = await self._reranker.rank(parsed, current_call.get())
        numbers = 1 if result.embeddings is None else result.embeddings.shape[1]
        if shown is not None:
            numbers += size // len(shown) // _BYTES_OF_A_NUMBER
        items = partial(response_items, result, shown)
        results = await in_slices(len(result.indices), numbers, items)
        body = response_body(result, results)
        return encode(body | {"data": results} if voyage else body)

    def _shown(self, model: str, documents: Sequence[Any]) -> Sequence[Any]:
        if model not in self._object_models:
            return documents
        return [{"text": document} if isinstance(document, str) else document for document in documents]


async def _exact(body: Body, documents: Sequence[Any]) -> Sequence[Any]:
    """Return documents to echo: as they were parsed, or as they came where that is not the same.

    A whole number of more than 64 bits is parsed to the nearest float.
    """
    if not any(isinstance(document, dict) for document in documents) or not _has_long_number(body.data):
        return documents
    sent = await raw_items(body, "documents")
    return [
        orjson.Fragment(bytes(raw)) if isinstance(document, dict) else document
        for document, raw in zip(documents, sent, strict=True)
    ]


def response_body(result: RerankResult, results: Any) -> dict[str, Any]:
    """Lay out the answer; keys stand in the order of the wire."""
    return {
        "model": result.model,
        "object": "list",
        "usage": {"total_tokens": result.usage.total, **result.usage.of_media},
        "results": results,
    }


def response_items(
    result: RerankResult, documents: Sequence[Any] | None, first: int, last: int
) -> list[dict[str, Any]]:
    """Lay out the results from ``first`` to before ``last``; what was not asked for is not there."""
    items: list[dict[str, Any]] = []
    for rank in range(first, last):
        index = result.indices[rank]
        item: dict[str, Any] = {"index": index, "relevance_score": result.scores[rank]}
        if documents is not None:
            item["document"] = documents[index]
        if result.embeddings is not None:
            item["embedding"] = result.embeddings[rank]
        items.append(item)
    return items

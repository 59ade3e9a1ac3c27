"""``RerankVendorsRestService``: the doors of other vendors' forms."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import rerank_rest_pb2_grpc

from services.core.call import current_call
from services.core.requests.defaults import DefaultModels
from services.core.serving.rest import Body, decode, encode
from services.rerank.logic import Reranker
from services.rerank.parsing import RequestParser
from services.rerank.vendors import cohere, tei

Context = grpc.aio.ServicerContext[httpbody_pb2.HttpBody, httpbody_pb2.HttpBody]
Answer = httpbody_pb2.HttpBody

Ours = Callable[[Body, dict[str, Any]], Awaitable[Answer]]
"""Answers a body, whose fields are these, in our own form."""


class RerankVendorsServicer(rerank_rest_pb2_grpc.RerankVendorsRestServiceServicer):
    """``RerankVendorsRestService`` over the capability."""

    def __init__(
        self, parser: RequestParser, reranker: Reranker, defaults: DefaultModels, ours: Ours
    ) -> None:
        self._parser = parser
        self._reranker = reranker
        self._defaults = defaults
        self._ours = ours

    async def CohereRerank(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /v2/rerank``."""
        return await self._cohere(cohere.CohereRerankBody.read(await decode(request)), "2")

    async def CohereRerankV1(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /cohere/v1/rerank``."""
        return await self.cohere_v1(await decode(request))

    async def cohere_v1(self, sent: dict[str, Any]) -> Answer:
        """Answer the fields of a call of Cohere's first version."""
        return await self._cohere(cohere.CohereRerankV1Body.read(sent), "1")

    async def TeiRerank(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /rerank``."""
        sent = await decode(request, keep=True)
        if "texts" not in sent:
            return await self._ours(request, sent)
        body = tei.TeiRerankBody.read(sent)
        fields = body.our_fields(self._defaults.find("ranks").id)
        parsed = self._parser.parse(fields, tei.LOCATE, strict=True)
        result = await self._reranker.rank(parsed, current_call.get())
        return encode(tei.answer(result, body.texts if parsed.return_documents else None))

    async def _cohere(self, body: cohere.CohereRerankBody, version: str) -> Answer:
        call = current_call.get()
        parsed = self._parser.parse(body.our_fields(), cohere.LOCATE, strict=True)
        result = await self._reranker.rank(parsed, call)
        return encode(cohere.answer(result, body, body.documents, call.request_id, version))

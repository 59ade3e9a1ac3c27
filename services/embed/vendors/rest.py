"""``EmbedVendorsRestService``: the doors of other vendors' forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import grpc.aio
import numpy as np
from google.api import httpbody_pb2
from searchfoundation.v1 import embed_rest_pb2, embed_rest_pb2_grpc

from services.core.call import current_call
from services.core.catalog.types import ModelSpec, OutputKind
from services.core.errors import ErrorCode, ServiceError
from services.core.requests.defaults import DefaultModels
from services.core.requests.parsing import Locate
from services.core.serving.exchange import original_path
from services.core.serving.rest import Body, decode, encode, in_slices
from services.embed.encoding import FloatMatrix, json_rows
from services.embed.logic import Embedder
from services.embed.parsing import RequestParser
from services.embed.types import EmbedResult, Encoding, MultiVectorResult, Result, SparseResult
from services.embed.vendors import cohere, gemini, ollama, tei, voyage

Context = grpc.aio.ServicerContext[Any, httpbody_pb2.HttpBody]
Answer = httpbody_pb2.HttpBody


class EmbedVendorsServicer(embed_rest_pb2_grpc.EmbedVendorsRestServiceServicer):
    """``EmbedVendorsRestService`` over the capability.

    ``info`` makes what ``/info`` says of a model.
    """

    def __init__(
        self,
        parser: RequestParser,
        embedder: Embedder,
        defaults: DefaultModels,
        specs: Mapping[str, ModelSpec],
        info: Callable[[ModelSpec], Mapping[str, Any]],
        max_items: int,
    ) -> None:
        self._max_items = max_items
        self._parser = parser
        self._embedder = embedder
        self._defaults = defaults
        self._specs = specs
        self._info = info

    # Cohere

    async def CohereEmbed(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /v2/embed``."""
        return await self._cohere(request, "2")

    async def CohereEmbedV1(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /v1/embed``."""
        return await self._cohere(request, "1")

    async def _cohere(self, request: Body, version: str) -> Answer:
        body = cohere.CohereEmbedBody.read(await decode(request))
        result = _dense(await self._embed(body.our_fields(), body.locate))
        columns = {each.value: await _rows(result.vectors, each) for each in result.encodings}
        return encode(cohere.answer(result, columns, body, current_call.get().request_id, version))

    # Text Embeddings Inference

    async def TeiEmbed(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /embed``."""
        body = tei.TeiEmbedBody.read(await decode(request))
        fields = body.our_fields(self._default(OutputKind.DENSE))
        return encode(await _rows(_dense(await self._embed(fields, tei.LOCATE)).vectors))

    async def TeiEmbedAll(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /embed_all``: of a model that pools, the vectors before that."""
        body = tei.TeiTokensBody.read(await decode(request))
        default = self._defaults.find(_GIVES[OutputKind.MULTI_VECTOR], tei.gives_tokens).id
        parsed = self._parser.parse(body.our_fields(default), tei.LOCATE, strict=True)
        spec = self._specs[parsed.model]
        if not tei.gives_tokens(spec):
            raise _other_vectors(parsed.model, "a vector for each token")
        if OutputKind.DENSE in spec.outputs:
            parsed = replace(parsed, multivector=True, normalized=False)
        result = cast(MultiVectorResult, await self._embedder.embed(parsed, current_call.get()))
        return encode([await _rows(matrix) for matrix in result.vectors])

    async def TeiEmbedSparse(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /embed_sparse``."""
        body = tei.TeiTokensBody.read(await decode(request))
        result = await self._embed(body.our_fields(self._default(OutputKind.SPARSE)), tei.LOCATE)
        if not isinstance(result, SparseResult):
            raise _other_vectors(result.model, "sparse vectors")
        items = await in_slices(
            len(result.vectors),
            result.entries // max(1, len(result.vectors)),
            lambda first, last: tei.sparse_items(result.vectors[first:last]),
        )
        return encode(items)

    async def TeiSimilarity(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /similarity``: cosines of the source and each sentence."""
        body = tei.TeiSimilarityBody.read(await decode(request))
        fields = body.our_fields(self._default(OutputKind.DENSE))
        vectors = _dense(await self._embed(fields, tei.LOCATE_SENTENCES)).vectors
        return encode(np.clip(vectors[1:] @ vectors[0], -1.0, 1.0))

    async def TeiInfo(  # noqa: N802 - named by the contract
        self, request: embed_rest_pb2.InfoRequest, context: Context
    ) -> Answer:
        """Answer ``GET /info``."""
        spec = self._defaults.find("embeds")
        return encode(self._info(spec))

    # Gemini

    async def GeminiEmbed(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /v1beta/models/<model>:embedContent``."""
        body = gemini.GeminiEmbedBody.read(await decode(request))
        fields = body.options(gemini.model_of(original_path())) | {"input": body.input()}
        result = _dense(await self._embed(fields, gemini.LOCATE))
        (values,) = await _rows(result.vectors)
        return encode({"embedding": {"values": values}})

    async def GeminiEmbedBatch(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /v1beta/models/<model>:batchEmbedContents``; like requests run together."""
        batch = gemini.GeminiBatchBody.read(await decode(request)).requests
        vectors: list[Any] = [None] * len(batch)
        parsed = [
            (positions, self._parser.parse(fields, gemini.locate_in(positions), strict=True))
            for positions, fields in gemini.alike(batch, gemini.model_of(original_path()), self._max_items)
        ]
        for positions, fields in parsed:
            result = _dense(await self._embedder.embed(fields, current_call.get()))
            for position, vector in zip(positions, result.vectors, strict=True):
                vectors[position] = vector
        numbers = max(len(vector) for vector in vectors)
        items = await in_slices(
            len(vectors), numbers, lambda first, last: [{"values": each} for each in vectors[first:last]]
        )
        return encode({"embeddings": items})

    # Ollama

    async def OllamaEmbed(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /api/embed``; without a text it only tells whether the model is there."""
        call = current_call.get()
        body = ollama.OllamaEmbedBody.read(await decode(request))
        body.check(self._spec(body.model))
        if body.input is None or body.input == []:
            return encode(ollama.embeddings(body.model, [], 0, call))
        result = _dense(await self._embed(body.our_fields(), ollama.LOCATE))
        rows = await _rows(result.vectors)
        return encode(ollama.embeddings(body.model, rows, result.usage.total, call))

    async def OllamaEmbedOne(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /api/embeddings``; without a text it only tells whether the model is there."""
        body = ollama.OllamaEmbedOneBody.read(await decode(request))
        body.check(self._spec(body.model))
        if body.prompt is None or body.prompt == "":
            return encode({"embedding": []})
        (row,) = await _rows(_dense(await self._embed(body.our_fields(), ollama.LOCATE_ONE)).vectors)
        return encode({"embedding": row})

    async def OllamaShow(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /api/show``."""
        return encode(ollama.shown(self._spec(ollama.OllamaShowBody.read(await decode(request)).named())))

    # Voyage

    async def VoyageMultimodalEmbed(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> Answer:
        """Answer ``POST /v1/multimodalembeddings``."""
        body = voyage.VoyageMultimodalBody.read(await decode(request))
        result = _dense(await self._embed(body.our_fields(), voyage.LOCATE))
        (encoding,) = result.encodings
        rows = await _rows(result.vectors, encoding)
        return encode(voyage.answer(result, rows, self._specs[result.model]))

    async def _embed(self, fields: dict[str, Any], locate: Locate) -> Result:
        parsed = self._parser.parse(fields, locate, strict=True)
        return await self._embedder.embed(parsed, current_call.get())

    def _default(self, kind: OutputKind) -> str:
        return self._defaults.find(_GIVES[kind], tei.gives(kind)).id

    def _spec(self, name: str) -> ModelSpec:
        return self._specs[self._parser.model(ollama.without_tag(name))]


_GIVES = {
    OutputKind.DENSE: "gives one vector for a text",
    OutputKind.MULTI_VECTOR: "gives a vector for each token",
    OutputKind.SPARSE: "gives sparse vectors",
}


def _dense(result: Result) -> EmbedResult:
    if isinstance(result, EmbedResult):
        return result
    raise _other_vectors(result.model, "one vector for a text")


def _other_vectors(model: str, wanted: str) -> ServiceError:
    reason = f"This form has {wanted}, which model '{model}' does not give."
    return ServiceError(ErrorCode.INPUT_INVALID, reason=reason)


async def _rows(vectors: FloatMatrix, encoding: Encoding = Encoding.FLOAT) -> Any:
    """Lay out vectors in one kind of number."""

    def rows(first: int, last: int) -> list[Any]:
        return json_rows(vectors[first:last], encoding)

    return await in_slices(len(vectors), vectors.shape[1], rows)

"""Typed protobuf messages from and to the plain types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from searchfoundation.v1 import common_pb2, rerank_pb2

from services.core.call import Timings
from services.core.requests.content import Location
from services.core.serving.messages import content_value, field_path, fill, float_vectors, timings
from services.rerank.types import RerankResult

_OPTIONS = {"truncation": "truncate", "max_doc_length": "max_document_length"}
"""Names of options where they differ from those of the REST side."""


def request_fields(
    start: rerank_pb2.RerankRequest | rerank_pb2.RerankStart, documents: Iterable[common_pb2.Content]
) -> dict[str, Any]:
    """Put a typed request into the fields of the REST schema, which then checks both alike."""
    options = start.options
    fields: dict[str, Any] = {
        "documents": [content_value(document) for document in documents],
        "return_embeddings": options.return_embeddings,
    }
    if start.model:
        fields["model"] = start.model
    if start.HasField("query"):
        fields["query"] = content_value(start.query)
    if options.HasField("top_n"):
        fields["top_n"] = options.top_n
    if options.HasField("return_documents"):
        fields["return_documents"] = options.return_documents
    if options.HasField("truncate"):
        fields["truncation"] = options.truncate
    if options.HasField("max_document_length"):
        fields["max_doc_length"] = options.max_document_length
    return fields


def unary_location(_model: str | None, location: Location) -> str:
    """Path of a field of ``RerankRequest``, for example ``documents[3].text`` or ``options.top_n``."""
    head, *rest = location
    name = str(head)
    if name in ("model", "query", "documents"):
        return field_path(name, rest)
    return field_path(f"options.{_OPTIONS.get(name, name)}", rest)


def stream_location(model: str | None, location: Location) -> str:
    """Path of a field of a stream: in its start, or of a document counted over all messages."""
    path = unary_location(model, location)
    return path if location[0] == "documents" else f"start.{path}"


async def response(
    result: RerankResult, documents: Sequence[common_pb2.Content] | None, measured: Timings
) -> rerank_pb2.RerankResponse:
    """Render a ranking; ``documents`` are those of the request, None to leave them out."""
    answer = rerank_pb2.RerankResponse(
        model=result.model,
        usage=common_pb2.Usage(total_tokens=result.total_tokens, prompt_tokens=result.total_tokens),
        timings=timings(measured),
    )
    await fill(answer.results, _ranked(result, documents))
    return answer


def _ranked(
    result: RerankResult, documents: Sequence[common_pb2.Content] | None
) -> Iterator[rerank_pb2.RankedDocument]:
    vectors = None if result.embeddings is None else float_vectors(result.embeddings)
    for rank, (index, score) in enumerate(zip(result.indices, result.scores, strict=True)):
        yield rerank_pb2.RankedDocument(
            index=index,
            relevance_score=score,
            document=None if documents is None else documents[index],
            embedding=None if vectors is None else vectors[rank],
        )

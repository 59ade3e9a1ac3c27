"""Cohere's ``/v2/rerank`` and ``/v1/rerank``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field, SkipValidation, WithJsonSchema

from services.core.errors import FieldError, validation_error
from services.core.requests.fields import Flag
from services.core.requests.foreign import ForeignBody, named, only
from services.core.requests.parsing import rest_location
from services.rerank.types import RerankResult

LOCATE = named({"max_doc_length": "max_tokens_per_doc"})
V1_FIELDS = frozenset({"rank_fields", "max_chunks_per_doc"})
"""Fields that nobody sends but clients of Cohere's first version."""

_DOCUMENTS_OF_A_UNIT = 100
_Query = Annotated[Any, WithJsonSchema({"type": "string"})]
_Strings = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_Objects = {"type": "array", "items": {"type": "object"}, "minItems": 1}


class CohereRerankBody(ForeignBody):
    """A query and texts to rank by it."""

    model: str = Field(description="Id of the model.")
    query: _Query
    documents: Annotated[Any, WithJsonSchema(_Strings)]
    top_n: SkipValidation[int | None] = Field(None, description="Return only the best results, this many.")
    return_documents: Flag = Field(False, description="Whether results carry their document.")
    max_tokens_per_doc: SkipValidation[int | None] = Field(
        None, description="Longest document in tokens, where the model leaves the choice."
    )
    priority: Annotated[Any, only("Calls are served in the order of their keys' shares; leave it out", 0)] = (
        None
    )

    def our_fields(self) -> dict[str, Any]:
        """Put the body into our words: documents are answered only where asked for."""
        return {
            "model": self.model,
            "query": self.query,
            "documents": self.documents,
            "top_n": self.top_n,
            "return_documents": self.return_documents is True,
            "max_doc_length": self.max_tokens_per_doc,
        }


class CohereRerankV1Body(CohereRerankBody):
    """A query and texts or objects to rank by it."""

    documents: Annotated[Any, WithJsonSchema({"anyOf": [_Strings, _Objects]})]
    rank_fields: Annotated[Any, WithJsonSchema({"anyOf": [_Strings, {"type": "null"}]})] = Field(
        None, description="Fields of the documents that are read, in this order; `text` when unset."
    )
    max_chunks_per_doc: Annotated[
        Any, only("Documents are read in one piece, cut at the model's length; leave it out", 1)
    ] = None

    def our_fields(self) -> dict[str, Any]:
        """Put the body into our words: what is read of an object is its text."""
        fields = super().our_fields()
        if self.rank_fields is None or not isinstance(self.documents, list):
            return fields
        names = self.rank_fields
        if not isinstance(names, list) or not names or not all(type(name) is str for name in names):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            raise _refused("rank_fields", "Input should be a list of names of fields", names)
        documents = cast("list[Any]", self.documents)
        return fields | {"documents": [_read(each, cast("list[str]", names)) for each in documents]}


def answer(
    result: RerankResult, body: CohereRerankBody, documents: Sequence[Any], request_id: str, version: str
) -> dict[str, Any]:
    """Lay out the answer; a document is an object, of which a string is the text."""
    results: list[dict[str, Any]] = []
    for index, score in zip(result.indices, result.scores, strict=True):
        item: dict[str, Any] = {"index": index, "relevance_score": score}
        if body.return_documents:
            shown = documents[index]
            item["document"] = {"text": shown} if isinstance(shown, str) else shown
        results.append(item)
    units = -(-len(documents) // _DOCUMENTS_OF_A_UNIT)
    meta = {"api_version": {"version": version}, "billed_units": {"search_units": units}}
    return {"id": request_id, "results": results, "meta": meta}


def _read(document: Any, names: Sequence[str]) -> Any:
    if not isinstance(document, dict):
        return document
    known = cast("Mapping[str, Any]", document)
    texts = [known[name] for name in names if name in known]
    if not texts or not all(isinstance(text, str) for text in texts):
        message = "Each document should have one of these fields, and strings there"
        raise _refused("rank_fields", message, list(names))
    return "\n".join(texts)


def _refused(field: str, message: str, value: object) -> Exception:
    return validation_error([FieldError(rest_location(None, (field,)), message, "value_error", value)])

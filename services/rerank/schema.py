"""What ``POST /v1/rerank`` takes, one class per model, made from the catalogue, and what it answers.

The same classes check requests and describe them in the served OpenAPI document. Fields that a model does
not have are ignored like all unknown ones; ``null`` stands for the default. Those of answers only describe:
``rest`` writes answers by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, cast

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainValidator, SkipValidation, create_model
from pydantic_core import PydanticCustomError, PydanticKnownError

from services.core.catalog.types import ModelSpec
from services.core.content import Content
from services.core.requests.content import Accepted, ImageDoc, TextDoc, read_content, read_contents, read_one
from services.core.requests.fields import Flag, Whole, class_name, without_default


class RerankingRequest(BaseModel):
    """What every model takes. ``model``, ``query`` and ``documents`` come with the subclass of a model."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    top_n: Annotated[int, Field(ge=1), Whole] | None = Field(
        None,
        validation_alias=AliasChoices("top_n", "top_k"),
        json_schema_extra=without_default,
        description="Return only the best results, this many. All when unset.",
    )
    return_documents: Flag = Field(True, description="Whether results carry their document.")
    truncation: Flag = Field(
        True,
        validation_alias=AliasChoices("truncation", "truncate"),
        description="Cut a query or document that is too long instead of refusing it.",
    )


def request_schema(spec: ModelSpec, max_documents: int) -> type[RerankingRequest]:
    """Make the request class of one model; ``max_documents`` bounds ``documents``."""
    accepted = Accepted.by(spec)
    fields: dict[str, Any] = {
        "model": (SkipValidation[Literal[spec.id]], Field(description="Id of the model.")),
        "query": (query_field(accepted), Field(description="What to rank by.")),
        "documents": (
            documents_field(accepted, max_documents),
            Field(description=f"1 to {max_documents} documents: strings or objects."),
        ),
        **_optional_fields(spec),
    }
    return create_model(
        class_name(spec, "RerankingRequest"),
        __base__=RerankingRequest,
        __doc__=f"Rankings by {spec.id}: texts of up to {spec.context_length} tokens.",
        **fields,
    )


def _optional_fields(spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if spec.document_length_limit:
        length: Any = Annotated[int, Field(ge=1, le=spec.document_length_limit), Whole]
        fields["max_doc_length"] = (
            length | None,
            Field(
                spec.max_document_length or spec.document_length_limit,
                validation_alias=AliasChoices("max_doc_length", "max_tokens_per_doc"),
                description="Longest document in tokens.",
            ),
        )
    if spec.return_embeddings_choice:
        fields["return_embeddings"] = (
            Flag,
            Field(False, description="Whether results carry the vector of their document."),
        )
    return fields


def query_field(accepted: Accepted) -> Any:
    """Build the annotation of ``query``; the value becomes a ``Content``."""
    parser = partial(read_one, read=partial(read_content, accepted=accepted))
    return Annotated[Any, PlainValidator(parser, json_schema_input_type=accepted.schema())]


def documents_field(accepted: Accepted, max_documents: int) -> Any:
    """Build the annotation of ``documents``; the value becomes a ``list[Content]``.

    Errors lie at ``(i,)`` for an item and at ``(i, "text")`` or ``(i, "image")`` inside an object.
    """
    items = Annotated[list[accepted.schema(listed=True)], Field(min_length=1, max_length=max_documents)]
    parser = _documents_parser(accepted, max_documents)
    return Annotated[Any, PlainValidator(parser, json_schema_input_type=items)]


def _documents_parser(accepted: Accepted, max_documents: int) -> Callable[[object], list[Content]]:
    def parse(value: object) -> list[Content]:
        if not isinstance(value, list):
            raise PydanticKnownError("list_type")
        items = cast("list[object]", value)
        if not items:
            raise PydanticCustomError(
                "too_short", "Documents cannot be empty. Provide at least one document."
            )
        if len(items) > max_documents:
            raise PydanticCustomError(
                "too_long",
                "A request can contain at most {max_documents} documents.",
                {"max_documents": max_documents},
            )
        return read_contents(items, accepted)

    return parse


class RerankingUsage(BaseModel):
    """Tokens of a request, special tokens included: query and documents once each, after the cut."""

    total_tokens: int = Field(description="Tokens billed.", ge=0)
    image_tokens: int | None = Field(None, description="Those of images, if any.", ge=0)


class RankedTextDoc(TextDoc):
    """A document as it was sent, with all its fields."""

    model_config = ConfigDict(extra="allow")


class RankedImageDoc(ImageDoc):
    """An image as it was sent, with all its fields."""

    model_config = ConfigDict(extra="allow")


class RerankingResult(BaseModel):
    """One document and its score."""

    index: int = Field(description="Position of the document in the request, from 0.", ge=0)
    relevance_score: float = Field(description="Higher is more relevant. The range depends on the model.")
    document: str | RankedTextDoc | RankedImageDoc | None = Field(
        None, description="The document as it was sent; only there with `return_documents`."
    )
    embedding: list[float] | None = Field(
        None, description="The document's vector, of length 1; only there with `return_embeddings`."
    )


class RerankingResponse(BaseModel):
    """The ranking, the most relevant document first; equal ones stand in the order of the request."""

    model: str = Field(description="Id of the model that answered, without a prefix.")
    object: Literal["list"] = Field(description="Always `list`.")
    usage: RerankingUsage
    results: list[RerankingResult]

"""What a body of ``POST /v1/rerank`` may hold, one class per model, made from the catalogue.

The same classes check requests and describe them in the served OpenAPI document. Fields that a model does
not have are ignored like all unknown ones; ``null`` stands for the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SkipValidation, create_model

from services.core.catalog.types import ModelSpec
from services.core.requests.content import Accepted
from services.core.requests.fields import Flag, Whole, class_name, without_default
from services.rerank.items import documents_field, query_field


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

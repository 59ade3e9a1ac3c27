"""The answer of ``POST /v1/rerank``, for the OpenAPI document only; ``rest`` writes answers by hand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from services.core.requests.content import ImageDoc, TextDoc


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

"""The answer of ``POST /v1/embeddings``, for the OpenAPI document only; ``rest`` writes answers by hand."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from services.embed.schemas import EncodingName

Number = int | float
Vector = list[Number] | str
Weights = dict[str, float]


class EmbeddingUsage(BaseModel):
    """Tokens of a request, special tokens included. Both counts are the same number."""

    total_tokens: int = Field(description="Tokens billed, after truncation.", ge=0)
    prompt_tokens: int = Field(description="Tokens of the input.", ge=0)
    image_tokens: int | None = Field(None, description="Those of images, if any.", ge=0)
    audio_tokens: int | None = Field(None, description="Those of sounds, if any.", ge=0)
    video_tokens: int | None = Field(None, description="Those of films, if any.", ge=0)


class SparseEmbeddingUsage(BaseModel):
    """Tokens of a request to a model of sparse vectors, special tokens included."""

    total_tokens: int = Field(description="Tokens billed, after truncation.", ge=0)
    input_tokens: int = Field(description="Tokens of the input.", ge=0)
    output_tokens: int = Field(description="Entries of the vectors answered.", ge=0)


class SingleEmbeddingData(BaseModel):
    """The vector of one input."""

    object: Literal["embedding"] = Field(description="Always `embedding`.")
    index: int = Field(description="Position of the input, from 0.", ge=0)
    embedding: Vector | Weights = Field(
        description="Numbers for `float`, `binary` and `ubinary`, a string for `base64`, in the first type "
        "asked for. Of a model of sparse vectors an object of tokens and their weights, the largest first."
    )
    embeddings_by_type: dict[EncodingName, Vector] | None = Field(
        None, description="The vector in every type asked for; only there when several were."
    )


class MultiEmbeddingData(BaseModel):
    """The vectors of one input, one for each of its tokens."""

    object: Literal["embeddings"] = Field(description="Always `embeddings`.")
    index: int = Field(description="Position of the input, from 0.", ge=0)
    embeddings: list[Vector] = Field(description="Each as `embedding` of a single vector.")
    tokenized_input: list[str] | None = Field(
        None, description="The tokens of the vectors; only there with `return_tokenized_input`."
    )
    embeddings_by_type: dict[EncodingName, list[Vector]] | None = Field(
        None, description="The vectors in every type asked for; only there when several were."
    )


class EmbeddingResponse(BaseModel):
    """One vector per input, or one for each token of it, in the order of the inputs."""

    model: str = Field(description="Id of the model that answered, without a prefix.")
    object: Literal["list"] = Field(description="Always `list`.")
    usage: EmbeddingUsage | SparseEmbeddingUsage
    data: list[SingleEmbeddingData] | list[MultiEmbeddingData]

"""Voyage's ``/v1/multimodalembeddings``; its other calls come to ``/v1/embeddings`` and ``/v1/rerank``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SkipValidation, WithJsonSchema

from services.core.catalog.types import ModelSpec
from services.core.errors import FieldError, validation_error
from services.core.requests.fields import Flag
from services.core.requests.foreign import ForeignBody, named
from services.core.requests.parsing import rest_location
from services.embed.types import EmbedResult

LOCATE = named({"input": "inputs", "truncate": "truncation", "dimensions": "output_dimension"})


class VoyagePart(ForeignBody):
    """A text or an image."""

    type: Literal["text", "image_url", "image_base64"]
    text: str | None = None
    image_url: str | None = None
    image_base64: str | None = Field(None, description="A data URL.")

    def content(self) -> dict[str, str]:
        """Return what our input has for it; raises ``ServiceError``."""
        value = getattr(self, self.type)
        if value is None:
            place = rest_location(None, ("inputs", "content", self.type))
            raise validation_error([FieldError(place, "Field required", "missing", value)])
        return {"text": value} if self.type == "text" else {"image": value}


class VoyageInput(ForeignBody):
    """What has one vector."""

    content: list[VoyagePart] = Field(min_length=1)

    def ours(self) -> dict[str, Any]:
        """Return it as one of our inputs."""
        parts = [part.content() for part in self.content]
        return parts[0] if len(parts) == 1 else {"content": parts}


class VoyageMultimodalBody(ForeignBody):
    """Texts and images; models that take groups take several parts in an input."""

    model: str = Field(description="Id of the model.")
    inputs: list[VoyageInput] = Field(min_length=1)
    input_type: Annotated[Any, WithJsonSchema({"enum": ["query", "document", None]})] = None
    truncation: Flag = Field(True, description="Cut texts that are too long instead of refusing them.")
    output_encoding: Literal["base64"] | None = Field(None, description="`base64` of little-endian float32.")
    output_dimension: SkipValidation[int | None] = None
    output_dtype: Annotated[
        Any, WithJsonSchema({"enum": ["float", "int8", "uint8", "binary", "ubinary", None]})
    ] = None

    def our_fields(self) -> dict[str, Any]:
        """Put the body into our words."""
        fields: dict[str, Any] = {
            "model": self.model,
            "input": [each.ours() for each in self.inputs],
            "input_type": self.input_type,
            "truncate": self.truncation is not False,
            "dimensions": self.output_dimension,
            "output_dtype": self.output_dtype or "float",
        }
        return fields | ({"encoding_format": "base64"} if self.output_encoding else {})


class VoyageItem(BaseModel):
    """One vector."""

    object: Literal["embedding"]
    embedding: list[float] | str
    index: int


class VoyageUsage(BaseModel):
    """What was billed."""

    text_tokens: int
    image_pixels: int
    video_pixels: int = Field(description="None: films are not taken here.")
    total_tokens: int


class VoyageEmbeddings(BaseModel):
    """The vectors, in the order of the inputs."""

    object: Literal["list"]
    data: list[VoyageItem]
    model: str
    usage: VoyageUsage


def answer(result: EmbedResult, rows: Any, spec: ModelSpec) -> dict[str, Any]:
    """Lay out the answer; ``rows`` holds the JSON of each vector."""
    rules = spec.images
    pixels = 0 if rules is None else result.usage.image * rules.tile_pixels**2 // rules.tile_tokens
    return {
        "object": "list",
        "data": [{"object": "embedding", "embedding": row, "index": index} for index, row in enumerate(rows)],
        "model": result.model,
        "usage": {
            "text_tokens": result.usage.text,
            "image_pixels": pixels,
            "video_pixels": 0,  # which the SDK reads of every answer
            "total_tokens": result.usage.total,
        },
    }

"""Cohere's ``/v1/embed`` and ``/v2/embed``."""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import Field, SkipValidation, WithJsonSchema

from services.core.errors import FieldError, validation_error
from services.core.requests.foreign import ForeignBody, named, only
from services.core.requests.parsing import Locate, rest_location
from services.embed.schema import EncodingName
from services.embed.spellings import INPUT_TYPES
from services.embed.types import EmbedResult

_IMAGE = "image"


class CohereEmbedBody(ForeignBody):
    """Texts, images or groups of both; of several kinds in this order."""

    model: str = Field(description="Id of the model.")
    texts: SkipValidation[list[str] | None] = Field(None, description="The texts.")
    images: SkipValidation[list[str] | None] = Field(None, description="Images as data URLs.")
    inputs: SkipValidation[list[dict[str, Any]] | None] = Field(
        None, description="Each `{content: [{type: text, text} or {type: image_url, image_url: {url}}]}`."
    )
    input_type: Annotated[Any, WithJsonSchema({"enum": [*INPUT_TYPES, _IMAGE, None]})] = Field(
        None, description="What the vectors are for: the model's task or side. `image` with images alone."
    )
    embedding_types: SkipValidation[list[EncodingName] | None] = Field(
        None, description="Kinds of numbers; `float` when unset."
    )
    output_dimension: SkipValidation[int | None] = Field(
        None, description="Keep only the first components, where the model leaves the choice."
    )
    truncate: Annotated[
        Any, only("Input should be 'NONE' or 'END': texts are cut at their end only", "NONE", "END")
    ] = None
    max_tokens: Annotated[Any, only("Texts are cut at the model's own length; leave it out")] = None
    priority: Annotated[Any, only("Calls are served in the order of their keys' shares; leave it out", 0)] = (
        None
    )

    @property
    def locate(self) -> Locate:
        """Where errors are."""
        lists = {"texts": self.texts, "images": self.images, "inputs": self.inputs}
        given = [name for name, value in lists.items() if value is not None]
        return named({"input": given[0] if len(given) == 1 else "inputs", "dimensions": "output_dimension"})

    def our_fields(self) -> dict[str, Any]:
        """Put the body into our words; raises ``ServiceError``."""
        fields: dict[str, Any] = {
            "model": self.model,
            "input": self._contents(),
            "embedding_types": self.embedding_types,
            "dimensions": self.output_dimension,
            "truncate": self.truncate != "NONE",
        }
        if self.input_type != _IMAGE:
            fields["input_type"] = self.input_type
        elif self.texts is not None or self.inputs is not None:
            raise _refused("input_type", "'image' is for images alone", self.input_type)
        return fields

    def _contents(self) -> list[Any]:
        contents: list[Any] = [
            *_listed("texts", self.texts),
            *({"image": image} for image in _listed("images", self.images)),
            *(_content(item) for item in _listed("inputs", self.inputs)),
        ]
        if not contents:
            raise _refused("texts", "Field required", self.texts)
        return contents


def answer(
    result: EmbedResult, columns: dict[str, Any], body: CohereEmbedBody, request_id: str, version: str
) -> Any:
    """Lay out the answer; ``columns`` holds the JSON of all vectors by kind of number."""
    by_type = version == "2" or body.embedding_types is not None
    return {
        "id": request_id,
        "texts": [text for text in body.texts or [] if type(text) is str],
        "embeddings": columns if by_type else columns["float"],
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"input_tokens": result.usage.total},
        },
        "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
    }


def _listed(name: str, value: object) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _refused(name, "Input should be a valid list", value)
    return cast("list[Any]", value)


def _content(item: Any) -> Any:
    parts = cast("dict[str, Any]", item).get("content") if isinstance(item, dict) else None
    if not isinstance(parts, list):
        raise _refused("inputs", "Each input should be an object with a list 'content'", item)
    contents = [_part(part) for part in cast("list[Any]", parts)]
    return contents[0] if len(contents) == 1 else {"content": contents}


def _part(part: Any) -> Any:
    if isinstance(part, dict):
        known = cast("dict[str, Any]", part)
        if known.get("type") == "text":
            return {"text": known.get("text")}
        image = known.get("image_url")
        if known.get("type") == "image_url" and isinstance(image, dict):
            return {"image": cast("dict[str, Any]", image).get("url")}
    raise _refused("inputs", "Each part should be of the type 'text' or 'image_url'", part)


def _refused(field: str, message: str, value: object) -> Exception:
    return validation_error([FieldError(rest_location(None, (field,)), message, "value_error", value)])

"""Gemini's ``:embedContent`` and ``:batchEmbedContents``. Fields come in camelCase or in snake_case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, cast
from urllib.parse import unquote

from pydantic import AliasChoices, BaseModel, Field, WithJsonSchema

from services.core.catalog.types import ModelSpec
from services.core.errors import FieldError, validation_error
from services.core.requests.content import Location
from services.core.requests.foreign import ForeignBody, named, only
from services.core.requests.parsing import Locate, rest_location
from services.embed.spellings import NO_TASK, TASK_TYPES

_PREFIX = "models/"
_TITLED = "RETRIEVAL_DOCUMENT"
_OWN_WORDS = {"dimensions": "outputDimensionality", "task_type": "taskType", "input": "content"}
LOCATE = named(_OWN_WORDS)


def _either(camel: str, snake: str) -> AliasChoices:
    return AliasChoices(camel, snake)


class GeminiBlob(ForeignBody):
    """A file in base64."""

    data: str
    mime_type: str = Field("", validation_alias=_either("mimeType", "mime_type"))


class GeminiPart(ForeignBody):
    """A text or an image."""

    text: str | None = None
    inline_data: GeminiBlob | None = Field(
        None,
        validation_alias=_either("inlineData", "inline_data"),
        description="An image, for models that take images.",
    )
    file_data: Annotated[Any, only("Files are not fetched from Google's storage; send 'inlineData'")] = Field(
        None, validation_alias=_either("fileData", "file_data")
    )

    def content(self) -> Any:
        """Return what our input has for it."""
        if self.text is not None:
            return self.text
        if self.inline_data is not None:
            return {"image": f"data:{self.inline_data.mime_type};base64,{self.inline_data.data}"}
        raise _refused(("content", "parts"), "Each part should have 'text' or 'inlineData'", None)


class GeminiContent(ForeignBody):
    """What has one vector; the lines of several texts are one text."""

    parts: list[GeminiPart] = Field(min_length=1)


class GeminiConfig(ForeignBody):
    """Options as Vertex has them."""

    auto_truncate: Annotated[Any, only("Say nothing or true: texts that are too long are cut", True)] = Field(
        None, validation_alias=_either("autoTruncate", "auto_truncate")
    )
    document_ocr: Annotated[Any, only("No text is read out of pictures", False)] = Field(
        None, validation_alias=_either("documentOcr", "document_ocr")
    )


class GeminiEmbedBody(GeminiConfig):
    """One content and what its vector is for."""

    model: Annotated[Any, WithJsonSchema({"type": ["string", "null"]})] = Field(
        None, description="The path names the model; this must be the same."
    )
    content: GeminiContent
    task_type: Annotated[Any, WithJsonSchema({"enum": [NO_TASK, *TASK_TYPES, None]})] = Field(
        None, validation_alias=_either("taskType", "task_type"), description="The nearest task of the model."
    )
    title: str | None = Field(None, description=f"Goes before the text; with {_TITLED} only.")
    output_dimensionality: Annotated[Any, WithJsonSchema({"type": ["integer", "null"], "minimum": 1})] = (
        Field(None, validation_alias=_either("outputDimensionality", "output_dimensionality"))
    )
    config: GeminiConfig | None = Field(
        None, validation_alias=_either("embedContentConfig", "embed_content_config")
    )

    def options(self, model: str) -> dict[str, Any]:
        """What the vector of the content should be, in our words."""
        told = self.model
        if told is not None and (not isinstance(told, str) or told.removeprefix(_PREFIX) != model):
            raise _refused(("model",), f"The path names '{model}'; this must be the same or left out", told)
        if self.task_type is not None and self.task_type not in (NO_TASK, *TASK_TYPES):
            choices = ", ".join(f"'{each}'" for each in (NO_TASK, *TASK_TYPES))
            raise _refused(("taskType",), f"Input should be one of {choices}", self.task_type)
        return {
            "model": model,
            "task_type": self.task_type,
            "dimensions": self.output_dimensionality,
            "truncate": True,
        }

    def input(self) -> Any:
        """Return the content as one of our inputs; raises ``ServiceError``."""
        parts = [part.content() for part in self.content.parts]
        texts = [part for part in parts if isinstance(part, str)]
        if self.title:
            if self.task_type != _TITLED or not texts:
                raise _refused(
                    ("title",), f"A title goes with a text and taskType {_TITLED} only", self.title
                )
            texts.insert(0, self.title)
        if len(texts) >= len(parts):
            return "\n".join(texts)
        return parts[0] if len(parts) == 1 else {"content": [_object(part) for part in parts]}


class GeminiBatchBody(ForeignBody):
    """Contents, each with its own options."""

    requests: list[GeminiEmbedBody] = Field(min_length=1)


class GeminiValues(BaseModel):
    """One vector."""

    values: list[float]


class GeminiEmbedding(BaseModel):
    """The vector of a content."""

    embedding: GeminiValues


class GeminiEmbeddings(BaseModel):
    """The vectors of the contents, in their order."""

    embeddings: list[GeminiValues]


def alike(batch: Sequence[GeminiEmbedBody], model: str, most: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Put requests of the same options together: their positions, and the fields of one request of ours.

    Raises ``ServiceError`` for more than ``most`` requests.
    """
    if len(batch) > most:
        raise _refused(("requests",), f"A batch can contain at most {most} requests", len(batch))
    groups: dict[tuple[Any, ...], tuple[list[int], dict[str, Any]]] = {}
    for position, body in enumerate(batch):
        options = body.options(model)
        key = tuple(map(repr, options.values()))
        positions, fields = groups.setdefault(key, ([], options | {"input": []}))
        positions.append(position)
        fields["input"].append(body.input())
    return list(groups.values())


def locate_in(positions: Sequence[int]) -> Locate:
    """Say where errors of a batch are; ``positions`` are those of the inputs among its requests."""

    def locate(model: str | None, location: Location) -> str:
        if not location:
            return rest_location(None, ("requests",))
        first, *rest = location
        if first == "input" and rest and isinstance(rest[0], int):
            return rest_location(None, ("requests", positions[rest[0]], "content", *rest[1:]))
        return rest_location(None, ("requests", positions[0], _OWN_WORDS.get(str(first), first), *rest))

    return locate


def described(spec: ModelSpec) -> dict[str, Any]:
    """Describe a model in Gemini's list."""
    return {
        "name": f"{_PREFIX}{spec.id}",
        "version": spec.revision,
        "displayName": spec.name,
        "description": spec.description,
        "inputTokenLimit": spec.context_length,
        "outputTokenLimit": 1,
        "supportedGenerationMethods": ["embedContent", "batchEmbedContents"],
    }


def model_of(path: str) -> str:
    """Return the model that a path names: ``/v1beta/models/<model>:<verb>``."""
    return unquote(path.partition("?")[0].partition("/models/")[2].rpartition(":")[0])


def _object(part: Any) -> Any:
    return {"text": part} if isinstance(part, str) else cast("dict[str, Any]", part)


def _refused(place: Location, message: str, value: object) -> Exception:
    return validation_error([FieldError(rest_location(None, place), message, "value_error", value)])

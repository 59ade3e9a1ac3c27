"""What a body of ``POST /v1/batch/embeddings`` may hold, one class per model, made from the catalogue.

The same classes check requests and describe them in the served OpenAPI document. Fields that a model does
not have are ignored like all unknown ones; ``null`` stands for the default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from services.core.catalog.types import ModelSpec
from services.core.requests.fields import Flag, Whole, class_name, clean_url, without_default

MAX_INLINE_LINES = 10_000
SCHEMES = ("https", "http", "s3", "gs")

_LONGEST_URL = 8192
_DEFAULT_TASK = "text-matching"
_RETRIEVAL = "retrieval"
_PASSAGE = "retrieval.passage"

Url = Annotated[str, Field(max_length=_LONGEST_URL), AfterValidator(clean_url)]
Lines = Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_INLINE_LINES)]


class BatchEmbeddingRequest(BaseModel):
    """What every model takes. ``model`` and its choices come with the subclass of a model."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    input: Lines | None = Field(
        None,
        json_schema_extra=without_default,
        description='Up to 10,000 lines, each `{"custom_id": ..., "body": {"input": ...}}` with an input as '
        "`POST /v1/embeddings` takes it. Either `input` or `input_url`.",
    )
    input_url: Url | None = Field(
        None,
        json_schema_extra=without_default,
        description="https://, s3:// or gs:// URL of a JSONL file of up to 50,000 such lines.",
    )
    webhook_url: Url | None = Field(
        None,
        json_schema_extra=without_default,
        description="Is sent the status by POST when the job has ended.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.input is None) == (self.input_url is None):
            raise PydanticCustomError("input_source", "Provide either 'input' or 'input_url'")
        if self.input_url is not None and self.input_url.partition("://")[0] not in SCHEMES:
            raise PydanticCustomError("url_scheme", "'input_url' should begin with https://, s3:// or gs://")
        return self


def request_schema(spec: ModelSpec) -> type[BatchEmbeddingRequest]:
    """Make the request class of one model."""
    fields: dict[str, Any] = {
        "model": (SkipValidation[Literal[spec.id]], Field(description="Id of the model.")),
        **_optional_fields(spec),
    }
    return create_model(
        class_name(spec, "BatchEmbeddingRequest"),
        __base__=BatchEmbeddingRequest,
        __doc__=f"A job for {spec.id}: texts of up to {spec.context_length} tokens.",
        **fields,
    )


def task_of(spec: ModelSpec, asked: str | None) -> str | None:
    """Give the model's task for what was asked: ``retrieval`` is about passages, nothing is text matching."""
    if asked == _RETRIEVAL:
        return _PASSAGE
    if asked is None and _DEFAULT_TASK in spec.tasks:
        return _DEFAULT_TASK
    return asked


def _optional_fields(spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if spec.normalize_choice:
        fields["normalized"] = (Flag, Field(True, description="Scale vectors to length 1."))
    if spec.matryoshka or spec.dimension_choices:
        fields["dimensions"] = (
            _dimensions(spec) | None,
            Field(
                None,
                json_schema_extra=without_default,
                description=f"Keep only the first components. The full width is {spec.dimensions}.",
            ),
        )
    if spec.tasks:
        default = task_of(spec, None) or spec.default_task
        shown: Any = {"default": default} if default else without_default
        tasks: Any = Literal[(*spec.tasks, *((_RETRIEVAL,) if _PASSAGE in spec.tasks else ()))]
        fields["task"] = (
            tasks | None,
            Field(None, json_schema_extra=shown, description="What the vectors are for."),
        )
    return fields


def _dimensions(spec: ModelSpec) -> Any:
    if spec.dimension_choices:
        return Annotated[Literal[spec.dimension_choices], Whole]
    return Annotated[int, Field(gt=0, le=spec.dimensions), Whole]

"""From what a caller sent to an ``EmbedRequest``, or to the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.core.serving.rest import BODY, SEPARATOR
from services.embed.inputs import MAX_ERRORS, Location
from services.embed.schemas import INPUT_NAMES, EmbeddingRequest, request_schema
from services.embed.types import EmbedRequest

Locate = Callable[[str | None, Location], str]
"""From the model's id, once it is known, and a location in its schema to the path callers know a field by."""

_LONGEST_NAME = 100
"""Of a refused model name, as much is said back."""


def rest_location(model: str | None, location: Location) -> str:
    """Join a location the way the hosted API does: ``body -> <model> -> <field>``."""
    return SEPARATOR.join(map(str, (BODY, *((model,) if model else ()), *location)))


class RequestParser:
    """Checks requests for the models that a process serves."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_items: int) -> None:
        specs = [spec for spec in served if Capability.EMBED in spec.capabilities]
        self._catalog = catalog
        self._schemas = {spec.id: request_schema(spec, max_items) for spec in specs}

    def parse(self, fields: dict[str, Any], locate: Locate = rest_location) -> EmbedRequest:
        """Check the fields of a request; ``locate`` words where an error is.

        Raises ``ServiceError``: ``VALIDATION_ERROR`` naming the fields, ``INPUT_MODEL_NOT_FOUND`` for a
        model that is unknown or not served here.
        """
        model = self._model(fields, locate)
        try:
            checked = self._schemas[model].model_validate(fields)
        except ValidationError as error:
            raise validation_error(_field_errors(error, model, locate)) from None
        return _to_request(model, checked)

    def _model(self, fields: dict[str, Any], locate: Locate) -> str:
        """Return the id of the served model that is named, which may be by an alias or with a prefix."""
        place = locate(None, ("model",))
        if "model" not in fields:
            raise validation_error([FieldError(place, "Field required", "missing", fields)])
        name = fields["model"]
        if not isinstance(name, str):
            raise validation_error([FieldError(place, "Input should be a valid string", "string_type", name)])
        if name in self._schemas:
            return name
        spec = self._catalog.get(name)
        if spec is None or spec.id not in self._schemas:
            raise ServiceError(
                ErrorCode.INPUT_MODEL_NOT_FOUND,
                model=name[:_LONGEST_NAME],
                available=", ".join(self._schemas),
            )
        return spec.id


def _to_request(model: str, checked: EmbeddingRequest) -> EmbedRequest:
    values = vars(checked)
    return EmbedRequest(
        model=model,
        texts=values["input"],
        encodings=values["embedding_type"],
        task=values.get("task"),
        dimensions=values.get("dimensions"),
        normalized=values.get("normalized") is not False,
        truncate=values.get("truncate", True) is True,  # models without the choice cut
    )


def _field_errors(error: ValidationError, model: str, locate: Locate) -> list[FieldError]:
    errors: list[FieldError] = []
    for line in error.errors(include_url=False, include_context=False)[:MAX_ERRORS]:
        location = line["loc"]
        if line["type"] in ("too_short", "too_long") and location[0] in INPUT_NAMES:
            location = ()  # the hosted API speaks of the whole request here
        errors.append(FieldError(locate(model, location), line["msg"], line["type"], line["input"]))
    return errors

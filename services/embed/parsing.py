"""From what a caller sent to an ``EmbedRequest``, or to the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

from pydantic import ValidationError

from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.embed.inputs import MAX_ERRORS, Location
from services.embed.schemas import INPUT_NAMES, EmbeddingRequest, request_schema
from services.embed.types import EmbedRequest

RenderLocation = Callable[[str, Location], str]
"""From the model's id and a location in its schema to the path a caller knows the field by."""

_LONGEST_ECHO = 100
_MOST_MEMBERS_ECHOED = 5


class Catalog(Protocol):
    """The part of the catalogue that finds a model by any of its names."""

    def get(self, id: str, /) -> ModelSpec | None:
        """Return the model, or ``None`` for a name nobody knows."""
        ...


def rest_location(model: str, location: Location) -> str:
    """Join a location the way the hosted API does: ``body -> <model> -> <field>``."""
    return " -> ".join(map(str, ("body", model, *location)))


class RequestParser:
    """Checks requests for the models that a process serves."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_items: int) -> None:
        specs = [spec for spec in served if Capability.EMBED in spec.capabilities]
        self._catalog = catalog
        self._schemas = {spec.id: request_schema(spec, max_items) for spec in specs}

    def parse(self, body: object) -> EmbedRequest:
        """Check a JSON body.

        Raises ``ServiceError``: ``VALIDATION_ERROR`` naming the fields, ``INPUT_MODEL_NOT_FOUND`` for a
        model that is unknown or not served here.
        """
        if not isinstance(body, dict):
            error = FieldError("body", "Input should be a valid object", "dict_type", echo(body))
            raise validation_error([error])
        fields = cast("dict[str, Any]", body)
        if "model" not in fields:
            raise validation_error([FieldError("body -> model", "Field required", "missing", echo(fields))])
        name = fields["model"]
        if not isinstance(name, str):
            message = "Input should be a valid string"
            raise validation_error([FieldError("body -> model", message, "string_type", echo(name))])
        return self.parse_fields(name, fields, rest_location)

    def parse_fields(self, name: str, fields: dict[str, Any], render: RenderLocation) -> EmbedRequest:
        """Check the fields of a request for the model ``name``; ``render`` words the locations of errors."""
        model = self.resolve(name)
        try:
            checked = self._schemas[model].model_validate(fields)
        except ValidationError as error:
            raise validation_error(_field_errors(error, model, render)) from None
        return _to_request(model, checked)

    def resolve(self, name: str) -> str:
        """Return the id of the served model called ``name``, which may carry a prefix."""
        if name in self._schemas:
            return name
        spec = self._catalog.get(name)
        if spec is None or spec.id not in self._schemas:
            raise ServiceError(
                ErrorCode.INPUT_MODEL_NOT_FOUND, model=echo(name), available=", ".join(self._schemas)
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
        late_chunking=values.get("late_chunking") is True,
    )


def _field_errors(error: ValidationError, model: str, render: RenderLocation) -> list[FieldError]:
    errors: list[FieldError] = []
    for line in error.errors(include_url=False, include_context=False)[:MAX_ERRORS]:
        location = line["loc"]
        if line["type"] in ("too_short", "too_long") and location[0] in INPUT_NAMES:
            location = ()  # the hosted API speaks of the whole request here
        errors.append(FieldError(render(model, location), line["msg"], line["type"], echo(line["input"])))
    return errors


def echo(value: object, depth: int = 0) -> Any:
    """Cut a refused value short for the error body: long texts to a part, large containers to their size."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST_ECHO else f"{value[:_LONGEST_ECHO]}…"
    if isinstance(value, dict):
        members = cast("dict[str, object]", value)
        if depth < 2 and len(members) <= _MOST_MEMBERS_ECHOED:
            return {echo(key): echo(member, depth + 1) for key, member in members.items()}
        return f"object with {len(members)} fields"
    if isinstance(value, list):
        items = cast("list[object]", value)
        if depth < 2 and len(items) <= _MOST_MEMBERS_ECHOED:
            return [echo(item, depth + 1) for item in items]
        return f"list of {len(items)} items"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)  # beyond what the JSON writer takes
    return value

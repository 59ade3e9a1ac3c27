"""From what a caller sent to the requests of this capability, or to the error that says what is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.batch.schemas import request_schema, task_of
from services.batch.types import BatchRequest
from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import FieldError, validation_error
from services.core.requests.parsing import Locate, ModelSchemas, rest_location

DEFAULT_LIMIT = 20
MAX_LIMIT = 1_000


class BatchParser:
    """Checks requests for the models that a process serves."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec]) -> None:
        self._specs = {spec.id: spec for spec in served if spec.supports(Capability.BATCH)}
        schemas = {spec.id: request_schema(spec) for spec in self._specs.values()}
        self._schemas = ModelSchemas(catalog, schemas)

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that jobs may name."""
        return tuple(self._specs)

    def model(self, name: str) -> str:
        """Give the id of the served model of a name; raises INPUT_MODEL_NOT_FOUND."""
        return self._schemas.model({"model": name})

    def parse(self, fields: dict[str, Any], locate: Locate = rest_location) -> BatchRequest:
        """Check the fields of a request; raises ``ServiceError`` as ``ModelSchemas.check`` does."""
        model, checked = self._schemas.check(fields, locate)
        values = vars(checked)
        return BatchRequest(
            model=model,
            lines=checked.input,
            input_url=checked.input_url,
            task=task_of(self._specs[model], values.get("task")),
            dimensions=values.get("dimensions"),
            normalized=values.get("normalized") is not False,
            webhook_url=checked.webhook_url,
        )


def parse_limit(text: str) -> int:
    """Read the length of a list; empty is the default, and more than there may be is the most."""
    if not text:
        return DEFAULT_LIMIT
    return min(whole_number(text, "limit", 1), MAX_LIMIT)


def parse_offset(text: str) -> int:
    """Read how many bytes to leave out."""
    return whole_number(text, "offset", 0) if text else 0


def whole_number(text: str, name: str, least: int) -> int:
    """Read a number of a query; raises ``ServiceError`` VALIDATION_ERROR."""
    place = f"query -> {name}"
    if not (text.isascii() and text.lstrip("-").isdigit() and len(text) < 19):
        raise validation_error([FieldError(place, "Input should be a valid integer", "int_parsing", text)])
    value = int(text)
    if value < least:
        message = f"Input should be greater than or equal to {least}"
        raise validation_error([FieldError(place, message, "greater_than_equal", text)])
    return value

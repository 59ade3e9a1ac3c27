"""From what a caller sent to the checked fields of a model, or to the error that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from pydantic import AliasChoices, BaseModel, ValidationError

from services.core.catalog import Catalog
from services.core.errors import ErrorCode, FieldError, ServiceError, validation_error
from services.core.requests.content import MAX_ERRORS, Location
from services.core.requests.fields import flag

S = TypeVar("S", bound=BaseModel)

Locate = Callable[[str | None, Location], str]
"""From the model's id, once it is known, and a location in its schema to the path callers know a field by."""

Translate = Callable[[dict[str, Any], Locate], dict[str, Any]]
"""From the fields of a request to the same in our own words."""

BODY = "body"
SEPARATOR = " -> "

_LONGEST_NAME = 100
"""Of a refused model name, as much is said back."""


def rest_location(model: str | None, location: Location) -> str:
    """Join a location the way the hosted API does: ``body -> <model> -> <field>``."""
    return SEPARATOR.join(map(str, (BODY, *((model,) if model else ()), *location)))


class ModelSchemas(Generic[S]):
    """The request classes of a capability, by the id of the served model.

    A wrong length of a field in ``whole`` is told as one of the whole request. ``translate`` puts what
    other vendors' clients say to a model into the words of its schema first, and knows the fields
    ``translated``. What a model does not have is ignored, but for the fields of ``missed``: they are refused
    unless they say what ``natural`` has for the model, which is what it does anyway.
    """

    def __init__(
        self,
        catalog: Catalog,
        schemas: Mapping[str, type[S]],
        *,
        whole: Sequence[str] = (),
        translate: Mapping[str, Translate] | None = None,
        translated: Collection[str] = (),
        missed: Collection[str] = (),
        natural: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        self._missed = frozenset(missed)
        self._natural = natural or {}
        self._taken = {model: {*_names(schema), *translated} for model, schema in schemas.items()}
        self._translate = translate or {}
        self._catalog = catalog
        self._schemas = schemas
        self._whole = whole

    def check(
        self, fields: dict[str, Any], locate: Locate = rest_location, *, strict: bool = False
    ) -> tuple[str, S]:
        """Return the id of the model that is named and the checked fields; ``locate`` words where errors are.

        With ``strict`` every field that the model does not have is one of ``missed``.

        Raises ``ServiceError``: ``VALIDATION_ERROR`` naming the fields, ``INPUT_MODEL_NOT_FOUND`` for a
        model that is unknown or not served here.
        """
        model = self.model(fields, locate)
        if strict or not self._missed.isdisjoint(fields):
            self._refuse_missed(model, fields if strict else self._missed & fields.keys(), fields, locate)
        if translate := self._translate.get(model):
            fields = translate(fields, locate)
        return model, checked(self._schemas[model], fields, locate, model, whole=self._whole)

    def _refuse_missed(
        self, model: str, names: Iterable[str], fields: Mapping[str, Any], locate: Locate
    ) -> None:
        natural = self._natural.get(model, {})
        errors = [
            FieldError(
                locate(model, (name,)), f"Model '{model}' leaves no choice here", "not_supported", value
            )
            for name in names
            if name not in self._taken[model]
            and (value := fields[name]) is not None
            and not (name in natural and flag(value) == natural[name])
        ]
        if errors:
            raise validation_error(errors)

    def model(self, fields: dict[str, Any], locate: Locate = rest_location) -> str:
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


def _names(schema: type[BaseModel]) -> Iterator[str]:
    """Names that a field of a schema may be sent by."""
    for name, field in schema.model_fields.items():
        alias = field.validation_alias
        yield from map(str, alias.choices) if isinstance(alias, AliasChoices) else (name,)


def checked(
    schema: type[S],
    fields: dict[str, Any],
    locate: Locate = rest_location,
    model: str | None = None,
    *,
    whole: Sequence[str] = (),
) -> S:
    """Check fields against one schema; ``model`` and ``whole`` only word where errors are.

    Raises ``ServiceError`` ``VALIDATION_ERROR`` naming the fields.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise validation_error(_field_errors(error, locate, model, whole)) from None


def _field_errors(
    error: ValidationError, locate: Locate, model: str | None, whole: Sequence[str]
) -> list[FieldError]:
    errors: list[FieldError] = []
    for line in error.errors(include_url=False, include_context=False)[:MAX_ERRORS]:
        location = line["loc"]
        if line["type"] in ("too_short", "too_long") and len(location) == 1 and location[0] in whole:
            location = ()
        errors.append(FieldError(locate(model, location), line["msg"], line["type"], line["input"]))
    return errors

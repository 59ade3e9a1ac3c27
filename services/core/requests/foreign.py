"""What adapters of other vendors' forms share: every field of a vendor is honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from services.core.requests.content import Location
from services.core.requests.fields import flag, spellings
from services.core.requests.parsing import Locate, checked, rest_location

B = TypeVar("B", bound="ForeignBody")


class ForeignBody(BaseModel):
    """A body in a vendor's form, or fields of vendors on a path of ours.

    Fields that no vendor has are ignored like all unknown ones, and null means the default.
    """

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @classmethod
    def read(cls: type[B], sent: Mapping[str, Any], locate: Locate = rest_location) -> B:
        """Check a body; raises ``ServiceError`` VALIDATION_ERROR naming fields as the vendor does."""
        return checked(cls, dict(sent), locate)

    @classmethod
    def look(cls, sent: Mapping[str, Any], locate: Locate = rest_location) -> None:
        """Check only what is there of these fields, which is mostly nothing; raises as ``read``."""
        if not cls.model_fields.keys().isdisjoint(sent):
            cls.read(sent, locate)


def only(reason: str, *values: object) -> PlainValidator:
    """Annotate a field of which null and ``values`` alone can be honoured; ``reason`` says why."""
    flags = bool in map(type, values)

    def check(value: object) -> object:
        known = flag(value) if flags else value
        if known is None or any(type(known) is type(each) and known == each for each in values):
            return known
        raise PydanticCustomError("not_supported", "{reason}", {"reason": reason})

    known = [each for value in values for each in (spellings(value) if type(value) is bool else [value])]
    return PlainValidator(
        check, json_schema_input_type=Annotated[Any, WithJsonSchema({"enum": [*known, None]})]
    )


def named(theirs: Mapping[str, str]) -> Locate:
    """Say where errors are in a vendor's words; ``theirs`` maps names of our fields to them."""

    def locate(model: str | None, location: Location) -> str:
        first = location[0] if location else None
        words = (theirs.get(first, first), *location[1:]) if isinstance(first, str) else location
        return rest_location(None, words)

    return locate

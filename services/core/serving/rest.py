"""The REST codec: ``google.api.HttpBody`` to plain Python and back."""

from __future__ import annotations

from typing import Any, cast

import orjson
from google.api import httpbody_pb2
from pydantic import ValidationError

from services.core.errors import FieldError, ServiceError, validation_error

BODY = "body"
SEPARATOR = " -> "
JSON = "application/json"


def decode(body: httpbody_pb2.HttpBody) -> dict[str, Any]:
    """Parse a JSON object, whatever content type the caller named.

    Raises:
        ServiceError: 422 ``json_invalid`` for malformed JSON, invalid UTF-8, lone surrogates and nesting
            beyond 1,024 levels; 422 ``dict_type`` for any other JSON value than an object.
    """
    try:
        value = orjson.loads(body.data)
    except orjson.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise validation_error([FieldError(BODY, message, "json_invalid")]) from None
    if not isinstance(value, dict):
        raise validation_error([FieldError(BODY, "Input should be a valid JSON object", "dict_type", value)])
    return cast("dict[str, Any]", value)


def encode(payload: Any) -> httpbody_pb2.HttpBody:
    """Render JSON with keys in their order.

    numpy arrays (C-contiguous) are written as they are; a float32 gets the shortest digits that read back as
    the same float32.
    """
    return httpbody_pb2.HttpBody(
        content_type=JSON, data=orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
    )


def from_pydantic(error: ValidationError, *prefix: str) -> ServiceError:
    """Translate a pydantic failure to the documented 422.

    ``prefix`` is put between ``body`` and pydantic's own location, for unions resolved by hand:
    ``from_pydantic(error, model_id)`` gives ``body -> <model_id> -> <field>``.
    """
    return validation_error(
        [
            FieldError(
                SEPARATOR.join((BODY, *prefix, *map(str, entry["loc"]))),
                entry["msg"],
                entry["type"],
                entry["input"],
            )
            for entry in error.errors(include_url=False, include_context=False)
        ]
    )

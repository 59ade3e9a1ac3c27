"""What a schema refuses, in the words of the API."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from services.core.errors import ErrorCode, ServiceError
from services.core.requests.parsing import checked


class Large(BaseModel):
    task: Literal["a", "b"]
    dimensions: int = Field(le=64)


def refusal(fields: dict[str, Any]) -> ServiceError:
    with pytest.raises(ServiceError) as refused:
        checked(Large, fields, model="large")
    assert refused.value.code is ErrorCode.VALIDATION_ERROR
    return refused.value


def test_a_bad_field_is_named_under_its_model() -> None:
    error = refusal({"task": "c", "dimensions": 64})
    assert error.detail == "Validation error: 'body -> large -> task' Input should be 'a' or 'b'"
    (entry,) = error.field_errors
    assert (entry.field, entry.type, entry.input) == ("body -> large -> task", "literal_error", "c")


def test_several_bad_fields_are_counted() -> None:
    error = refusal({"dimensions": 65})
    assert error.detail.startswith("Validation errors in 2 fields")
    assert [entry.type for entry in error.field_errors] == ["missing", "less_than_equal"]

"""Bodies of failures, as ``services.core.errors`` lays them out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class ErrorObject(BaseModel):
    """The same failure in the form that OpenAI's SDKs read."""

    message: str = Field(description="What went wrong, for people.")
    type: str = Field(description="Kind of failure, as `invalid_request_error`.")
    param: str | None = Field(description="The field of the body that is meant, if one is.")
    code: str = Field(description="What went wrong, by OpenAI's name for it where there is one.")


class ErrorResponse(BaseModel):
    """Body of a failure."""

    detail: str = Field(description="What went wrong, for people.")
    code: str = Field(description="What went wrong, for programs.")
    request_id: str = Field(description="Names this request in the server's logs.")
    error: ErrorObject


class ValidationErrorItem(BaseModel):
    """One refused field."""

    field: str = Field(description="Where it is: `body -> <model> -> <field>`.")
    message: str = Field(description="What is wrong with it.")
    type: str = Field(description="Kind of the error.")
    input: Any = Field(description="The refused value, cut short.")


class HTTPValidationError(ErrorResponse):
    """Body of a 422."""

    errors: list[ValidationErrorItem]

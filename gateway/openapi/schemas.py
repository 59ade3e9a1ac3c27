"""What the gateway answers by itself: models and health."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from services.core.openapi.errors import ErrorResponse


class ModelPricing(BaseModel):
    """Prices, in the form other tools expect; a server of one's own asks none."""

    prompt: str
    completion: str
    image: str
    request: str
    input_cache_read: str
    input_cache_write: str


class ModelDatacenter(BaseModel):
    """Where a model runs."""

    country_code: str


class ModelInfo(BaseModel):
    """A model this server runs."""

    id: str = Field(description="Full id; requests take it with or without its prefix.")
    object: Literal["model"]
    owned_by: str
    hugging_face_id: str = Field(description="Repository of the weights.")
    name: str
    created: int = Field(description="Unix time of the model's release.")
    input_modalities: list[str]
    output_modalities: list[str]
    quantization: str
    context_length: int = Field(description="Longest input in tokens.")
    max_output_length: int = Field(description="Width of a vector.")
    pricing: ModelPricing
    supported_sampling_parameters: list[str]
    supported_features: list[str]
    description: str
    datacenters: list[ModelDatacenter]


class ModelListResponse(BaseModel):
    """All models of this server."""

    object: Literal["list"]
    data: list[ModelInfo]


class Health(BaseModel):
    """The gateway is up."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Every pool answers. ``degraded``: something that calls can do without does not."""

    status: Literal["ok", "degraded"]
    checks: dict[str, dict[str, Any]] = Field(description="What each pool says of itself.")


class Unready(ErrorResponse):
    """Some pool does not answer."""

    status: Literal["unavailable"]
    checks: dict[str, dict[str, Any]] = Field(description="What each pool says of itself.")

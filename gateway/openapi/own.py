"""What the gateway answers without a service, in the document: models and health."""

from __future__ import annotations

from pydantic import BaseModel

from gateway.openapi.schemas import Health, ModelInfo, ModelListResponse, Readiness, Unready
from services.core.errors import ErrorCode
from services.core.openapi.parts import Chapter, Document, answer, errors, path_parameter


def own() -> Chapter:
    """``/health``, ``/live``, ``/ready`` and ``/v1/models``, none of which asks for a key."""
    return Chapter(
        tags={"Models": "What this server runs.", "Health": "For load balancers and people."},
        paths={**_health(), **_models()},
        answers=(ModelListResponse, Health, Readiness, Unready),
    )


def _health() -> Document:
    ready = _read("Health", "Whether requests would be answered", "ready", Readiness, "All pools answer.")
    ready["responses"]["503"] = answer("Some pool does not answer.", Unready)
    return {
        "/health": {"get": _read("Health", "Whether the gateway runs", "health", Health, "It does.")},
        "/live": {"get": _read("Health", "Whether the gateway runs", "live", Health, "It does.")},
        "/ready": {"get": ready},
    }


def _models() -> Document:
    described = _read("Models", "Describe a model", "get_model", ModelInfo, "The model.")
    described["parameters"] = [
        path_parameter(
            "model_id", "Id of the model, with or without its prefix; the slash may be sent as it is."
        )
    ]
    described["responses"] |= errors([ErrorCode.RESOURCE_NOT_FOUND])
    return {
        "/v1/models": {
            "get": _read("Models", "List the models", "list_models", ModelListResponse, "The models.")
        },
        "/v1/models/{model_id}": {"get": described},
    }


def _read(tag: str, summary: str, name: str, model: type[BaseModel], description: str) -> Document:
    return {
        "tags": [tag],
        "summary": summary,
        "operationId": name,
        "responses": {"200": answer(description, model)},
    }

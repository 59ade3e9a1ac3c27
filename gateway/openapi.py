"""The served OpenAPI document, made from the schemas that check requests and the tables that word errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from services.batch.responses import BatchStatus
from services.batch.schemas import request_schema as batch_schema
from services.classify.responses import (
    ClassificationResponse,
    ClassifierSummary,
    DeletedClassifier,
    TrainingResponse,
)
from services.classify.schemas import (
    classifies,
    few_shot_schema,
    train_schema,
    trains,
    update_schema,
    zero_shot_schema,
)
from services.core.catalog.types import Capability, ModelSpec
from services.core.errors import ERRORS, ErrorCode
from services.embed.responses import EmbeddingResponse
from services.embed.schemas import request_schema as embed_schema
from services.rerank.responses import RerankingResponse
from services.rerank.schemas import request_schema as rerank_schema

Document = dict[str, Any]

_REF = "#/components/schemas/"
_JSON = "application/json"
_MODEL_ERRORS = (
    ErrorCode.INPUT_MODEL_NOT_FOUND,
    ErrorCode.INPUT_TOKEN_LIMIT_EXCEEDED,
    ErrorCode.INPUT_INVALID,
    ErrorCode.INPUT_TOO_LARGE,
    ErrorCode.AUTH_MISSING_API_KEY,
    ErrorCode.AUTH_INVALID_API_KEY,
    ErrorCode.AUTH_INVALID_FORMAT,
    ErrorCode.AUTHZ_INSUFFICIENT_BALANCE,
    ErrorCode.VALIDATION_ERROR,
    ErrorCode.RATE_REQUEST_LIMIT_EXCEEDED,
    ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED,
    ErrorCode.RATE_CONCURRENCY_LIMIT_EXCEEDED,
    ErrorCode.RATE_IP_LIMIT_EXCEEDED,
    ErrorCode.INTERNAL_ERROR,
    ErrorCode.SERVICE_UNAVAILABLE,
    ErrorCode.SERVICE_TIMEOUT,
)
_CLASSIFIER_ERRORS = (ErrorCode.RESOURCE_NOT_FOUND,)
_TRAINING_ERRORS = (
    *_CLASSIFIER_ERRORS,
    ErrorCode.INPUT_INVALID_LABELS,
    ErrorCode.INPUT_LABEL_LIMIT_EXCEEDED,
    ErrorCode.AUTHZ_RESOURCE_LIMIT_EXCEEDED,
    ErrorCode.CONFLICT_RESOURCE_BUSY,
)
_BATCH_ERRORS = (ErrorCode.RESOURCE_NOT_FOUND,)
_RETRIED = (HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_DESCRIPTION = """\
Self-hosted Search Foundation API, answered by the models this server runs.

Send the key as `Authorization: Bearer <key>`; the server's operator makes keys, or runs it without.
Unknown fields of a request are ignored, and `null` means the default. Failures answer
`{detail, code, request_id}`; a 422 also names the fields in `errors`.
"""


class ErrorResponse(BaseModel):
    """Body of a failure."""

    detail: str = Field(description="What went wrong, for people.")
    code: str = Field(description="What went wrong, for programs.")
    request_id: str = Field(description="Names this request in the server's logs.")


class ValidationErrorItem(BaseModel):
    """One refused field."""

    field: str = Field(description="Where it is: `body -> <model> -> <field>`.")
    message: str = Field(description="What is wrong with it.")
    type: str = Field(description="Kind of the error.")
    input: Any = Field(description="The refused value, cut short.")


class HTTPValidationError(ErrorResponse):
    """Body of a 422."""

    errors: list[ValidationErrorItem]


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


class Readiness(Health):
    """Every pool answers."""

    checks: dict[str, dict[str, Any]] = Field(description="What each pool says of itself.")


class Unready(ErrorResponse):
    """Some pool does not answer."""

    status: Literal["unavailable"]
    checks: dict[str, dict[str, Any]] = Field(description="What each pool says of itself.")


def build_openapi(
    served: Mapping[Capability, Sequence[ModelSpec]],
    *,
    max_items: int = 2048,
    max_documents: int = 2048,
    max_classify_items: int = 512,
) -> Document:
    """Describe a gateway whose pools serve these models for these capabilities.

    ``max_items`` is the services' limit on the list form of ``input``, ``max_documents`` that on documents
    to rank, ``max_classify_items`` that on texts to classify or to learn from.
    """
    operations = [
        *_embeddings({s.id: embed_schema(s, max_items) for s in served.get(Capability.EMBED, ())}),
        *_rerank({s.id: rerank_schema(s, max_documents) for s in served.get(Capability.RERANK, ())}),
        *_classification(served.get(Capability.CLASSIFY, ()), max_classify_items),
        *_batch({s.id: batch_schema(s) for s in served.get(Capability.BATCH, ())}),
    ]
    classifiers = bool(served.get(Capability.CLASSIFY))
    answers: list[type[BaseModel]] = [
        *(operation.answer for operation in operations),
        *((ClassifierSummary, DeletedClassifier) if classifiers else ()),
        ErrorResponse,
        HTTPValidationError,
        ModelListResponse,
        Health,
        Readiness,
        Unready,
    ]
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        *((model, "validation") for operation in operations for model in operation.schemas()),
        *((model, "serialization") for model in answers),
    ]
    _, definitions = models_json_schema(models, ref_template=f"{_REF}{{model}}")
    paths = {**_health_paths(), **_model_paths()}
    paths |= {operation.path: {"post": _operation(operation)} for operation in operations}
    paths |= _classifier_paths() if classifiers else {}
    paths |= _batch_paths() if served.get(Capability.BATCH) else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "search-foundation",
            "version": version("search-foundation"),
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"HTTPBearer": {"type": "http", "scheme": "bearer"}},
        },
        "tags": [
            {"name": "Embeddings", "description": "Turn texts into vectors."},
            {"name": "Rerank", "description": "Order documents by their relevance to a query."},
            {"name": "Classification", "description": "Sort texts under labels, known or learned."},
            {"name": "Batch Embeddings", "description": "Embed many texts in the background."},
            {"name": "Models", "description": "What this server runs."},
            {"name": "Health", "description": "For load balancers and people."},
        ],
    }


@dataclass(frozen=True, slots=True)
class _Operation:
    """A POST whose body is one of several schemas, told apart by ``model``, or ``other``, which has none."""

    path: str
    name: str
    tag: str
    summary: str
    description: str
    title: str
    requests: Mapping[str, type[BaseModel]]
    answer: type[BaseModel]
    answered: str
    other: type[BaseModel] | None = None
    errors: Sequence[ErrorCode] = ()

    def schemas(self) -> Iterator[type[BaseModel]]:
        """All that a body may be."""
        yield from self.requests.values()
        if self.other is not None:
            yield self.other


def _embeddings(requests: Mapping[str, type[BaseModel]]) -> Iterator[_Operation]:
    if requests:
        yield _Operation(
            path="/v1/embeddings",
            name="create_embeddings",
            tag="Embeddings",
            summary="Embed texts",
            description="Answers one vector per input, in the order of the inputs. All or nothing.",
            title="Embedding Request",
            requests=requests,
            answer=EmbeddingResponse,
            answered="One vector per input.",
        )


def _rerank(requests: Mapping[str, type[BaseModel]]) -> Iterator[_Operation]:
    if requests:
        yield _Operation(
            path="/v1/rerank",
            name="rerank",
            tag="Rerank",
            summary="Rank documents",
            description="Orders documents by their relevance to a query. All or nothing.",
            title="Reranking Request",
            requests=requests,
            answer=RerankingResponse,
            answered="The ranking, the most relevant document first.",
        )


def _classification(specs: Iterable[ModelSpec], max_items: int) -> Iterator[_Operation]:
    specs = tuple(specs)
    if specs:
        yield _Operation(
            path="/v1/classify",
            name="classify",
            tag="Classification",
            summary="Classify texts",
            description="Sorts each input under labels: the request's, or those of a trained classifier. "
            "Texts over the model's context are cut.",
            title="Classification Request",
            requests={s.id: zero_shot_schema(s, max_items) for s in specs if classifies(s)},
            answer=ClassificationResponse,
            answered="One result per input.",
            other=few_shot_schema(max_items),
            errors=_CLASSIFIER_ERRORS,
        )
        yield _Operation(
            path="/v1/train",
            name="train",
            tag="Classification",
            summary="Train a classifier",
            description="Makes a classifier from examples, or trains one of one's own further.",
            title="Training Request",
            requests={s.id: train_schema(s, max_items) for s in specs if trains(s)},
            answer=TrainingResponse,
            answered="The classifier is stored.",
            other=update_schema(max_items),
            errors=_TRAINING_ERRORS,
        )


def _classifier_paths() -> Document:
    errors = _errors([code for code in _MODEL_ERRORS if not code.startswith("INPUT_")])
    summaries = {"type": "array", "items": {"$ref": f"{_REF}{ClassifierSummary.__name__}"}}
    listed = _answer("The classifiers of the key, oldest first.", ClassifierSummary, headers=_LIMIT_HEADERS)
    listed["content"][_JSON]["schema"] = summaries
    delete = {
        "tags": ["Classification"],
        "summary": "Delete a classifier",
        "operationId": "delete_classifier",
        "security": [{"HTTPBearer": []}],
        "parameters": [
            {
                "name": "classifier_id",
                "in": "path",
                "required": True,
                "description": "Id of a classifier of one's own.",
                "schema": {"type": "string"},
            }
        ],
        "responses": {
            "200": _answer("It is gone.", DeletedClassifier, headers=_LIMIT_HEADERS),
            **errors,
            **_errors(_CLASSIFIER_ERRORS),
        },
    }
    ways = {
        method: {
            "tags": ["Classification"],
            "summary": "List one's classifiers",
            "operationId": name,
            "security": [{"HTTPBearer": []}],
            "responses": {"200": listed, **errors},
        }
        for method, name in (("get", "list_classifiers"), ("post", "list_classifiers_by_post"))
    }
    return {"/v1/classifiers": ways, "/v1/classifiers/{classifier_id}": {"delete": delete}}


def _batch(requests: Mapping[str, type[BaseModel]]) -> Iterator[_Operation]:
    if requests:
        yield _Operation(
            path="/v1/batch/embeddings",
            name="create_batch",
            tag="Batch Embeddings",
            summary="Embed many texts in the background",
            description="Stores a job. What is wrong with single lines is told in its error file.",
            title="Batch Embedding Request",
            requests=requests,
            answer=BatchStatus,
            answered="The job is stored and will be done.",
        )


def _batch_paths() -> Document:
    status = _answer("Where the job is.", BatchStatus, headers=_LIMIT_HEADERS)
    listed = _answer("The newest jobs of the key, newest first.", BatchStatus, headers=_LIMIT_HEADERS)
    listed["content"][_JSON]["schema"] = {"type": "array", "items": {"$ref": f"{_REF}{BatchStatus.__name__}"}}
    limit = {
        "name": "limit",
        "in": "query",
        "description": "How many at most, up to 1,000.",
        "schema": {"type": "integer", "minimum": 1, "default": 20},
    }
    conflict = (ErrorCode.CONFLICT_STATE,)
    busy = (ErrorCode.CONFLICT_RESOURCE_BUSY,)
    return {
        "/v1/batches": {"get": _batch_call("List one's jobs", "list_batches", listed, (), [limit])},
        "/v1/batch/{batch_id}": {
            "get": _batch_call("Ask how far a job is", "get_batch", status, _BATCH_ERRORS, [_BATCH_ID]),
            "delete": _batch_call(
                "Cancel a job", "cancel_batch", status, (*_BATCH_ERRORS, *conflict), [_BATCH_ID]
            ),
        },
        **{
            f"/v1/batch/{{batch_id}}/{file}": {
                "get": _batch_call(
                    f"Download the {words}",
                    f"download_batch_{file}",
                    _lines(f"The {words}, one JSON object a line, in the order of the input."),
                    (*_BATCH_ERRORS, *busy),
                    [_BATCH_ID, _OFFSET],
                )
            }
            for file, words in (("output", "output file"), ("errors", "error file"))
        },
    }


def _batch_call(
    summary: str, name: str, answer: Document, errors: Sequence[ErrorCode], parameters: Sequence[Document]
) -> Document:
    common = [code for code in _MODEL_ERRORS if not code.startswith("INPUT_")]
    return {
        "tags": ["Batch Embeddings"],
        "summary": summary,
        "operationId": name,
        "security": [{"HTTPBearer": []}],
        "parameters": list(parameters),
        "responses": {"200": answer, **_errors((*common, *errors))},
    }


def _lines(description: str) -> Document:
    content = {"application/x-ndjson": {"schema": {"type": "string"}}}
    return {"description": description, "content": content, "headers": _LIMIT_HEADERS}


def _operation(operation: _Operation) -> Document:
    headers = _LIMIT_HEADERS | _TIME_HEADER
    return {
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
        "operationId": operation.name,
        "security": [{"HTTPBearer": []}],
        "requestBody": {
            "required": True,
            "content": {
                _JSON: {"schema": {"title": operation.title, **_body(operation)}},
            },
        },
        "responses": {
            "200": _answer(operation.answered, operation.answer, headers=headers),
            **_errors((*_MODEL_ERRORS, *operation.errors)),
        },
    }


def _body(operation: _Operation) -> Document:
    refs = {model: f"{_REF}{schema.__name__}" for model, schema in operation.requests.items()}
    by_model: Document = {
        "oneOf": [{"$ref": ref} for ref in refs.values()],
        "discriminator": {"propertyName": "model", "mapping": refs},
    }
    if operation.other is None:
        return by_model
    other = {"$ref": f"{_REF}{operation.other.__name__}"}
    return {"anyOf": [by_model, other] if refs else [other]}


def _model_paths() -> Document:
    parameter = {
        "name": "model_id",
        "in": "path",
        "required": True,
        "description": "Id of the model, with or without its prefix; the slash may be sent as it is.",
        "schema": {"type": "string"},
    }
    describe = _read("Models", "Describe a model", "get_model", ModelInfo, "The model.")
    describe["parameters"] = [parameter]
    describe["responses"] |= _errors([ErrorCode.RESOURCE_NOT_FOUND])
    return {
        "/v1/models": {
            "get": _read("Models", "List the models", "list_models", ModelListResponse, "The models.")
        },
        "/v1/models/{model_id}": {"get": describe},
    }


def _health_paths() -> Document:
    ready = _read("Health", "Whether requests would be answered", "ready", Readiness, "All pools answer.")
    ready["responses"]["503"] = _answer("Some pool does not answer.", Unready)
    return {
        "/health": {"get": _read("Health", "Whether the gateway runs", "health", Health, "It does.")},
        "/live": {"get": _read("Health", "Whether the gateway runs", "live", Health, "It does.")},
        "/ready": {"get": ready},
    }


def _read(tag: str, summary: str, name: str, model: type[BaseModel], description: str) -> Document:
    return {
        "tags": [tag],
        "summary": summary,
        "operationId": name,
        "responses": {"200": _answer(description, model)},
    }


def _answer(description: str, model: type[BaseModel], headers: Document | None = None) -> Document:
    answer: Document = {
        "description": description,
        "content": {_JSON: {"schema": {"$ref": f"{_REF}{model.__name__}"}}},
    }
    return answer | {"headers": headers} if headers else answer


def _errors(codes: Iterable[ErrorCode]) -> Document:
    """Describe the answers by status. Braces in the texts stand for what a request fills in."""
    texts: dict[int, list[str]] = {}
    for code in codes:
        spec = ERRORS[code]
        texts.setdefault(spec.http_status, []).append(f"- **{code}**: {spec.template}")
    return {str(status): _error(status, "\n".join(texts[status])) for status in sorted(texts)}


def _error(status: int, description: str) -> Document:
    body = HTTPValidationError if status == HTTPStatus.UNPROCESSABLE_ENTITY else ErrorResponse
    return _answer(description, body, headers=_RETRY_HEADER if status in _RETRIED else None)


def _header(description: str, kind: str) -> Document:
    return {"description": description, "schema": {"type": kind}}


_BATCH_ID = {
    "name": "batch_id",
    "in": "path",
    "required": True,
    "description": "Id of a job of one's own.",
    "schema": {"type": "string"},
}
_OFFSET = {
    "name": "offset",
    "in": "query",
    "description": "Bytes to leave out, to go on with a download that broke off.",
    "schema": {"type": "integer", "minimum": 0, "default": 0},
}
_LIMIT_HEADERS = {
    "X-Request-Id": _header("Names this request in the server's logs.", "string"),
    "X-RateLimit-Remaining-Requests": _header(
        "Requests left in this minute; 2147483647 without a limit.", "integer"
    ),
    "X-RateLimit-Remaining-Tokens": _header(
        "Tokens left in this minute; 2147483647 without a limit.", "integer"
    ),
}
_TIME_HEADER = {"Server-Timing": _header("Milliseconds of tokenize, queue and inference.", "string")}
_RETRY_HEADER = {"Retry-After": _header("Seconds to wait before trying again.", "integer")}

"""From what a caller sent to a ``RerankRequest``, or to the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, ModelSpec
from services.core.requests.foreign import ForeignBody, only
from services.core.requests.parsing import Locate, ModelSchemas, rest_location
from services.rerank.schema import RerankingRequest, request_schema
from services.rerank.types import RerankRequest


class NotHonoured(ForeignBody):
    """Fields of other vendors that mean something that is not done here."""

    raw_scores: Annotated[Any, only("Scores are the model's as they are shown to all", False)] = None
    return_text: Annotated[Any, only("Say 'return_documents'", False)] = None
    truncation_direction: Annotated[Any, only("Texts are cut at their right end only", "right", "Right")] = (
        None
    )
    truncate_prompt_tokens: Annotated[
        Any, only("Say 'truncation: true'; texts are cut at the model's own length", -1)
    ] = None


class RequestParser:
    """Checks requests for the models that a process serves."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_documents: int) -> None:
        schemas = {
            spec.id: request_schema(spec, max_documents)
            for spec in served
            if spec.supports(Capability.RERANK)
        }
        self._schemas = ModelSchemas(catalog, schemas, missed=("max_tokens_per_doc",))

    def parse(
        self, fields: dict[str, Any], locate: Locate = rest_location, *, strict: bool = False
    ) -> RerankRequest:
        """Check the fields of a request; raises ``ServiceError`` as ``ModelSchemas.check`` does.

        ``strict``, for other vendors' forms, refuses fields that the model does not have.
        """
        NotHonoured.look(fields, locate)
        return _to_request(*self._schemas.check(fields, locate, strict=strict))


def _to_request(model: str, checked: RerankingRequest) -> RerankRequest:
    values = vars(checked)
    return RerankRequest(
        model=model,
        query=values["query"],
        documents=values["documents"],
        top_n=values["top_n"],
        return_documents=values["return_documents"] is not False,
        truncate=values["truncation"] is not False,
        max_document_length=values.get("max_doc_length"),
        return_embeddings=values.get("return_embeddings") is True,
    )

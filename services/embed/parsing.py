"""From what a caller sent to an ``EmbedRequest``, or to the error that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from services.core.catalog import Catalog
from services.core.catalog.types import Capability, InputType, ModelSpec
from services.core.requests.parsing import Locate, ModelSchemas, rest_location
from services.embed.schema import INPUT_NAMES, EmbeddingRequest, request_schema
from services.embed.spellings import FOREIGN_NAMES, TRANSLATED, Spellings, natural
from services.embed.types import EmbedRequest


class RequestParser:
    """Checks requests for the models that a process serves."""

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec], *, max_items: int) -> None:
        specs = [spec for spec in served if spec.supports(Capability.EMBED)]
        schemas = {spec.id: request_schema(spec, max_items) for spec in specs}
        translate = {spec.id: Spellings(spec).translate for spec in specs}
        # The hosted API speaks of the whole request when a list has the wrong length.
        self._schemas = ModelSchemas(
            catalog,
            schemas,
            whole=INPUT_NAMES,
            translate=translate,
            translated=TRANSLATED,
            missed=FOREIGN_NAMES,
            natural={spec.id: natural(spec) for spec in specs},
        )

    def parse(
        self, fields: dict[str, Any], locate: Locate = rest_location, *, strict: bool = False
    ) -> EmbedRequest:
        """Check the fields of a request; raises ``ServiceError`` as ``ModelSchemas.check`` does.

        ``strict``, for other vendors' forms, refuses fields that the model does not have.
        """
        return to_request(*self._schemas.check(fields, locate, strict=strict))

    def model(self, name: str) -> str:
        """Return the id of a served model; raises ``ServiceError`` as ``ModelSchemas.model`` does."""
        return self._schemas.model({"model": name})


def to_request(model: str, checked: EmbeddingRequest) -> EmbedRequest:
    """Make the request of checked fields of ``model``."""
    values = vars(checked)
    return EmbedRequest(
        model=model,
        contents=values["input"],
        encodings=values["embedding_type"],
        task=values.get("task"),
        dimensions=values.get("dimensions"),
        normalized=values.get("normalized") is not False,
        truncate=values.get("truncate", True) is True,  # models without the choice cut
        role=InputType(values.get("input_type") or InputType.DOCUMENT),
        late_chunking=values.get("late_chunking") is True,
        multivector=values.get("return_multivector") is True,
        tokens=values.get("return_tokenized_input") is True,
    )

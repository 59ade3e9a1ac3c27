"""``/rerank`` of Text Embeddings Inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, SkipValidation, WithJsonSchema

from services.core.requests.fields import Flag
from services.core.requests.foreign import ForeignBody, named, only
from services.rerank.types import RerankResult

LOCATE = named({"documents": "texts"})


class TeiRerankBody(ForeignBody):
    """A query and texts to rank by it."""

    query: Annotated[Any, WithJsonSchema({"type": "string"})]
    texts: Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 1})]
    truncate: Flag = Field(False, description="Cut texts that are too long instead of refusing them.")
    truncation_direction: Annotated[
        Any, only("Input should be 'Right': texts are cut at their end only", "Right", "right")
    ] = None
    raw_scores: Annotated[
        Any, only("Scores are answered as '/v1/rerank' has them; there are no raw ones", False)
    ] = None
    return_text: Flag = Field(False, description="Whether results carry their text.")
    model: SkipValidation[str | None] = Field(None, description="An addition: instead of the default model.")

    def our_fields(self, default: str) -> dict[str, Any]:
        """Put the body into our words."""
        return {
            "model": default if self.model is None else self.model,
            "query": self.query,
            "documents": self.texts,
            "truncate": self.truncate is True,
            "return_documents": self.return_text is True,
        }


class TeiRank(BaseModel):
    """One text of a ranking."""

    index: int
    score: float
    text: str | None = Field(None, description="Only where it was asked for.")


def answer(result: RerankResult, texts: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Lay out the answer; ``texts`` are those to be shown."""
    return [
        {"index": index, "score": score} | ({} if texts is None else {"text": texts[index]})
        for index, score in zip(result.indices, result.scores, strict=True)
    ]

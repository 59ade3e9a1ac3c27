"""Chat in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from services.chat.responses import ChatCompletion
from services.chat.schemas import request_schema
from services.core.catalog.types import ModelSpec
from services.core.openapi.parts import Bounds, Chapter, Operation

_TAG = "Chat"
_DESCRIPTION = """\
Answers a conversation of texts and images, in the form of OpenAI's API.

With `stream` the answer comes as server-sent events (`text/event-stream`): `data:` lines with
`chat.completion.chunk` objects whose deltas join to the whole answer, then `data: [DONE]`. An error
behind the first chunk is a `data:` line with the body of an error, and the stream ends without `[DONE]`."""


def chapters(specs: Sequence[ModelSpec], bounds: Bounds) -> Iterator[Chapter]:
    """``/v1/chat/completions`` of these models."""
    operation = Operation(
        path="/v1/chat/completions",
        name="create_chat_completion",
        tag=_TAG,
        summary="Answer a conversation",
        description=_DESCRIPTION,
        title="Chat Completion Request",
        requests={spec.id: request_schema(spec, bounds.answer_tokens) for spec in specs},
        answer=ChatCompletion,
        answered="The answer.",
    )
    yield Chapter({_TAG: "Answer conversations of texts and images."}, (operation,))

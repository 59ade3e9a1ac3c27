"""Answers in the form of OpenAI's API: one object, or the chunks of a stream. Plain classes describe them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from services.core.content import Usage
    from services.core.inference.sampling import Chosen


class TopLogprob(BaseModel):
    """A token that might have stood there."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """The tokens of an answer with their log probabilities."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    """The answer; there is one."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Parts of the conversation's tokens."""

    cached_tokens: int = Field(description="Were in memory and not computed again; billed as the others.")
    image_tokens: int


class ChatUsage(BaseModel):
    """What a call consumed."""

    prompt_tokens: int = Field(description="Tokens of the conversation, images included.")
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletion(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since the epoch.")
    model: str
    choices: list[Choice]
    usage: ChatUsage


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all parts of an answer of ``model`` have in common; ``bytes_of`` says what a token writes."""

    model: str
    bytes_of: Callable[[int], bytes]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self, text: str, tokens: Sequence[Chosen] | None, finish: str, usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Lay out a whole answer; ``tokens`` None leaves their probabilities out."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None if tokens is None else self.logprobs(tokens),
            "finish_reason": finish,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def chunk(
        self, delta: dict[str, Any], tokens: Sequence[Chosen] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """Lay out one chunk of a stream."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None if tokens is None else self.logprobs(tokens),
            "finish_reason": finish,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Lay out the chunk that tells the usage of a stream."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def logprobs(self, tokens: Sequence[Chosen]) -> dict[str, Any]:
        """Lay out tokens with their log probabilities."""
        content = [
            {
                **self._token(token.id, token.logprob),
                "top_logprobs": [self._token(id, logprob) for id, logprob in token.likely],
            }
            for token in tokens
        ]
        return {"content": content}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        written = self.bytes_of(id)
        # JSON has no infinity, which a token that may not come has.
        return {
            "token": written.decode("utf-8", "replace"),
            "bytes": list(written),
            "logprob": max(logprob, -9999.0),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_fields(prompt: Usage, said: int, shared: int) -> dict[str, Any]:
    """Lay out what a call consumed; ``said`` are the tokens of the answer, ``shared`` those not computed."""
    return {
        "prompt_tokens": prompt.total,
        "completion_tokens": said,
        "total_tokens": prompt.total + said,
        "prompt_tokens_details": {"cached_tokens": shared, "image_tokens": prompt.image},
    }

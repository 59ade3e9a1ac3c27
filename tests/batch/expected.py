"""The files a job should have, written by the description of the format alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

WORDS = (
    "river",
    "stone",
    "cloud",
    "green",
    "early",
    "market",
    "letter",
    "window",
    "silver",
    "garden",
    "music",
)


def texts(count: int, seed: int = 7) -> list[str]:
    """Texts of 3 to 24 words, no two alike."""
    random = np.random.default_rng(seed)
    return [f"{n} {' '.join(random.choice(WORDS, random.integers(2, 24)))}" for n in range(count)]


def lines(given: Sequence[str]) -> list[dict[str, Any]]:
    """Input lines for texts."""
    return [{"custom_id": f"line-{n}", "body": {"input": text}} for n, text in enumerate(given)]


def line_name(job_id: str, number: int) -> str:
    return hashlib.blake2b(f"{job_id}:{number}".encode(), digest_size=12).hexdigest()


def output(
    job_id: str, model: str, vectors: Any, tokens: Sequence[int], leave_out: Sequence[int] = ()
) -> bytes:
    """The output file of ``lines``."""
    return b"".join(
        orjson.dumps(
            {
                "id": f"batch_req_{line_name(job_id, number)}",
                "custom_id": f"line-{number}",
                "response": {
                    "status_code": 200,
                    "request_id": line_name(job_id, number),
                    "body": {
                        "model": model,
                        "object": "list",
                        "usage": {"total_tokens": count, "prompt_tokens": count},
                        "data": [{"object": "embedding", "index": 0, "embedding": []}],
                    },
                },
                "error": None,
            }
        ).replace(b'"embedding":[]', b'"embedding":' + _numbers(vector))
        + b"\n"
        for number, (vector, count) in enumerate(zip(vectors, tokens, strict=True))
        if number not in leave_out
    )


def _numbers(vector: Any) -> bytes:
    return orjson.dumps(np.ascontiguousarray(vector), option=orjson.OPT_SERIALIZE_NUMPY)

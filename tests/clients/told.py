"""Runs calls of real clients, in their environment, and tells what each came to; imports nothing of ours.

Prints a JSON line for each call: ``[name, true, value]`` for an answer and ``[name, false, text of the
exception]`` for a refusal. Then come the blocks of code from standard input, a JSON list of ``[name, code]``,
whose value is what they print.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

# What a client looks up elsewhere, or tells others, is not asked for here.
os.environ |= {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "ANONYMIZED_TELEMETRY": "False",
    "MEM0_TELEMETRY": "False",
    "AGNO_TELEMETRY": "false",
    "LANGSMITH_TRACING": "false",
}

_look_up = socket.getaddrinfo


def _only_here(host: Any, *args: Any, **options: Any) -> Any:
    """Refuse addresses elsewhere: a client that was not pointed here must not find another server."""
    if host not in ("127.0.0.1", "localhost", b"127.0.0.1", None):
        raise OSError(f"{host!r} is not this machine")
    return _look_up(host, *args, **options)


socket.getaddrinfo = _only_here

BASE, KEY = os.environ["BASE"], os.environ["API_KEY"]
MODEL, CLIP, CHAT = os.environ["MODEL"], os.environ["CLIP"], os.environ["CHAT_MODEL"]
PICTURE = os.environ["PICTURE"]
V1 = f"{BASE}/v1"
TEXTS = ["a cat purrs", "rain"]
QUERY = "feline"
NOPE = "nope"
"""A model that no server has."""

Call = Callable[[], Any]
_calls: list[Call] = []


def call(function: Call) -> Call:
    """Register a call; its name with spaces is the name in the report. It may be a coroutine function."""
    _calls.append(function)
    return function


def ranked(results: Any) -> list[list[Any]]:
    """Index and score of results that are objects."""
    return [[each.index, each.relevance_score] for each in results]


def main() -> None:
    """Run all calls, then the blocks."""
    for function in _calls:
        _tell(function.__name__.replace("_", " "), function)
    for name, code in json.load(sys.stdin):
        _tell(name, lambda code=code: _printed(code))


def _tell(name: str, function: Call) -> None:
    # Clients print as well, which is not the report.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            value = function()
            value = asyncio.run(value) if inspect.iscoroutine(value) else value
            answered = True
        except Exception as error:  # noqa: BLE001 - what a client raises is what is looked at
            answered, value = False, f"{type(error).__name__}: {error}"
    print(json.dumps([name, answered, value]), flush=True)


def _printed(code: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    return output.getvalue()

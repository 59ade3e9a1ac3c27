"""``search-foundation chat``: ask a model that answers, and see the answer come."""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from search_foundation.batch_client import KEY_VARIABLE, URL_HELP, gateway_url

_TIMEOUT = httpx.Timeout(300.0, connect=10.0)
_MODEL = "jina-vlm"


class ChatError(Exception):
    """There is no answer; the message is a sentence for the user."""


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat",
        help="ask a model that answers",
        description="Asks over the REST API, with the key in the variable "
        f"{KEY_VARIABLE}. Without a text it asks for one turn after another, until the end of the input.",
    )
    parser.add_argument("text", nargs="?", help="what to ask; - reads it from standard input")
    parser.add_argument("--model", default=_MODEL, help=f"{_MODEL} by default")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE|URL", help="a picture to look at"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 to 2; 0 by default")
    parser.add_argument("--url", help=URL_HELP)


def run(args: argparse.Namespace) -> int:
    """Ask; returns 1 when there is no answer."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": args.system}] if args.system else []
    try:
        pictures = [_picture(each) for each in args.image]
        for text in _texts(args.text):
            messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}]})
            pictures = []
            said = ""
            for piece in _answer(args, messages):
                print(piece, end="", flush=True)
                said += piece
            print()
            messages.append({"role": "assistant", "content": said})
    except ChatError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _texts(asked: str | None) -> Iterator[str]:
    if asked == "-":
        yield sys.stdin.read()
    elif asked is not None:
        yield asked
    else:
        while True:
            if sys.stdin.isatty():
                print("> ", end="", flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            if line.strip():
                yield line.strip()


def _picture(source: str) -> dict[str, Any]:
    url = source
    if not source.startswith(("http://", "https://", "data:")):
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ChatError(f"{source} cannot be read: {error.strerror}.") from None
        kind = mimetypes.guess_type(source)[0] or "application/octet-stream"
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _answer(args: argparse.Namespace, messages: list[dict[str, Any]]) -> Iterator[str]:
    """Ask for a stream and give the pieces of the answer."""
    body = {"model": args.model, "messages": messages, "stream": True}
    body |= {} if args.max_tokens is None else {"max_tokens": args.max_tokens}
    body |= {} if args.temperature is None else {"temperature": args.temperature}
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    house = gateway_url(args.url)
    url = f"{house}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=_TIMEOUT) as answer:
            if not answer.is_success:
                answer.read()
                raise ChatError(_told(answer))
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ChatError(f"The answer has broken off: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
            raise ChatError("The answer has broken off.")
    except httpx.HTTPError as error:
        raise ChatError(f"No answer from {house}: {error or type(error).__name__}.") from None
    except httpx.InvalidURL as error:
        raise ChatError(f"Wrong --url: {error}.") from None


def _told(answer: httpx.Response) -> str:
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return f"The server answers {answer.status_code}."
    return str(detail)

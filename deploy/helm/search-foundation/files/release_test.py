"""Ask the release for everything that it serves, through its gateway. Standard library only."""

import json
import math
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

URL = os.environ["GATEWAY_URL"].rstrip("/")
MODELS = json.loads(os.environ["MODELS"])  # of each capability, those to try
HEADERS = {"Content-Type": "application/json"}
if os.environ.get("API_KEY"):
    HEADERS["Authorization"] = "Bearer " + os.environ["API_KEY"]
CA_FILE = os.environ.get("CA_FILE", "")
CONTEXT = None
if URL.startswith("https:"):
    CONTEXT = ssl.create_default_context(cafile=CA_FILE if os.path.exists(CA_FILE) else None)
DEADLINE = time.monotonic() + float(os.environ.get("PATIENCE_SECONDS", "60"))


class RefusedError(Exception):
    """The release does not do what it should; the text says what."""


def ask(path: str, body: object = None) -> str:
    """GET a path, or POST a body to it, patiently; returns the text of the answer."""
    while True:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(URL + path, data, HEADERS)
            with urllib.request.urlopen(request, timeout=30, context=CONTEXT) as response:
                return response.read().decode()
        except (urllib.error.URLError, OSError) as error:
            detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error)
            status = getattr(error, "code", 0)
            if (status and status not in (502, 503, 504)) or time.monotonic() > DEADLINE:
                raise RefusedError(f"{path} answered {status or 'nothing'}: {detail}") from None
            time.sleep(2)


def check(right: object, what: str) -> None:
    """Raise RefusedError with ``what`` unless it is right."""
    if not right:
        raise RefusedError(what)


def embed(model: str) -> str:
    """Embed a text."""
    answer = json.loads(ask("/v1/embeddings", {"model": model, "input": "hello world", "normalized": True}))
    vector = answer["data"][0]["embedding"]
    length = math.sqrt(sum(x * x for x in vector))
    check(vector and 0.98 < length < 1.02, f"a vector of {len(vector)} numbers and length {length:.3f}")
    return f"{len(vector)} numbers for {answer['usage']['total_tokens']} tokens"


def rerank(model: str) -> str:
    """Rank two documents."""
    body = {"model": model, "query": "a planet", "documents": ["a recipe for soup", "the planet Mars"]}
    results = json.loads(ask("/v1/rerank", body))["results"]
    check(results[0]["index"] == 1, f"the wrong document first: {results}")
    return f"the right one of {len(results)} documents first"


def classify(model: str) -> str:
    """Choose between two labels."""
    body = {"model": model, "input": ["the planet Mars"], "labels": ["astronomy", "cooking"]}
    (answer,) = json.loads(ask("/v1/classify", body))["data"]
    check(answer["prediction"] == "astronomy", f"the wrong label: {answer}")
    return "the right one of 2 labels"


def batch(model: str) -> str:
    """Run a job to its end."""
    lines = [{"custom_id": str(number), "body": {"input": f"text {number}"}} for number in range(2)]
    job = json.loads(ask("/v1/batch/embeddings", {"model": model, "input": lines}))
    while job["status"] in ("pending", "processing"):
        check(time.monotonic() < DEADLINE, f"a job that does not end: {job}")
        time.sleep(0.5)
        job = json.loads(ask(f"/v1/batch/{job['batch_id']}"))
    check(job["status"] == "completed", f"a job that did not complete: {job}")
    output = ask(f"/v1/batch/{job['batch_id']}/output").splitlines()
    return f"a job of {len(output)} lines"


def chat(model: str) -> str:
    """Ask for a word."""
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8}
    answer = json.loads(ask("/v1/chat/completions", body))
    check(answer["choices"][0]["message"]["content"], f"no words: {answer}")
    return f"{answer['usage']['completion_tokens']} tokens"


ASK: dict[str, Callable[[str], str]] = {
    "embed": embed,
    "rerank": rerank,
    "classify": classify,
    "batch": batch,
}
failed = False
for capability, models in MODELS.items():
    problem = f"this test does not know {capability}"
    for model in models if capability in ASK else ():
        try:
            print(f"OK: {capability} by {model} gave {ASK[capability](model)}", flush=True)
            break
        except RefusedError as refused:  # a pool may list models that have another of its capabilities
            problem = str(refused)
    else:
        failed = True
        print(f"FAILED: {capability}: {problem}", flush=True)
sys.exit(failed)

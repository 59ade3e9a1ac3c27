"""The bodies that cost a service most among those that its limits let through, by capability and door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import Message
from searchfoundation.v1 import batch_pb2, batch_rest_pb2, classify_pb2, embed_pb2, rerank_pb2
from searchfoundation.v1.common_pb2 import Content, Media

from tests.stack import MODEL

MIB = 1 << 20
WORDS = "the quick brown fox, "

_REST: dict[str, tuple[str, str, dict[str, Any]]] = {
    "embeddings": ("EmbedRestService/CreateEmbeddings", "/v1/embeddings", {"input": "x", "truncate": True}),
    "rerank": ("RerankRestService/Rerank", "/v1/rerank", {"query": "q", "documents": ["d"]}),
    "classify": ("ClassifyRestService/Classify", "/v1/classify", {"input": ["x"], "labels": ["a", "b"]}),
    "train": (
        "ClassifyRestService/Train",
        "/v1/train",
        {"input": [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]},
    ),
    "batch": (
        "BatchRestService/CreateBatch",
        "/v1/batch/embeddings",
        {"input": [{"custom_id": "a", "body": {"input": "x"}}]},
    ),
}


@dataclass(frozen=True)
class Worst:
    """One call: its gRPC method, its message, and where it is a REST call its path and body."""

    name: str
    method: str
    message: Message
    path: str = ""
    body: bytes = b""


def calls(size: int) -> Iterator[Worst]:
    """Calls of about ``size`` bytes, of jobs four times as many, with little for the model to compute."""
    for name, (method, path, fields) in _REST.items():
        for what, more in _junk(size):
            yield _rest(f"{name}, {what}", method, path, {"model": MODEL, **fields, **more})
    yield from _texts(size)
    yield from _jobs(4 * size)
    yield from _typed(size)


def many_texts() -> Worst:
    """As many texts as one call may have, whose answer is long."""
    fields = {"model": MODEL, "input": ["word"] * 2048}
    return _rest("embeddings, an answer of 9 MB", *_REST["embeddings"][:2], fields)


def _junk(size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields that nobody asked for; a bracket and a comma count as a value each."""
    yield "many values", {"junk": [[]] * 120_000, "more": "x" * (size - 700_000)}
    yield "many names", {f"k{number}": number for number in range(200_000)}
    yield "a long text", {"junk": "x" * size}
    yield "wide texts", {"junk": ["x" * 100_000 + "😀"] * (size // 100_000)}
    yield "too wide a text", {"junk": "x" * min(size, 11 * MIB) + "😀"}
    yield "refused items", {"input": [{}] * 60_000, "documents": [{}] * 60_000, "junk": "x" * (size // 2)}


def _texts(size: int) -> Iterator[Worst]:
    method, path, _ = _REST["embeddings"]
    text = WORDS * (min(size, 11 * MIB) // len(WORDS))
    yield _rest("embeddings, one text", method, path, {"model": MODEL, "truncate": True, "input": text})
    escaped = b'{"model":"%s","input":"' % MODEL.encode() + rb"\n" * (min(size, 11 * MIB) // 2) + b'"}'
    yield Worst(
        "embeddings, escapes", f"/searchfoundation.v1.{method}", HttpBody(data=escaped), path, escaped
    )
    method, path, _ = _REST["rerank"]
    documents = [{"text": "d", "n": 12345678901234567890123, "x": ["a"] * 90}] * 2000
    fields = {"model": MODEL, "query": "q", "documents": documents, "return_documents": True}
    yield _rest("rerank, objects echoed", method, path, fields)
    fields = {"model": MODEL, "query": text, "documents": ["d"]}
    yield _rest("rerank, a long query", method, path, fields)
    method, path, _ = _REST["train"]
    examples = [{"text": text, "label": "a"}, {"text": "y", "label": "b"}]
    yield _rest("train, one text", method, path, {"model": MODEL, "input": examples})


def _jobs(size: int) -> Iterator[Worst]:
    """Lines that are all refused when it is their turn: jobs are stored first."""
    text = "x" * (size // 10_000)
    for what, name in (("lines", "c{}"), ("lines named by numbers", None)):
        lines = [
            {"custom_id": number if name is None else name.format(number), "body": {"junk": text}}
            for number in range(10_000)
        ]
        yield _rest(f"batch, {what}", *_REST["batch"][:2], {"model": MODEL, "input": lines})
    large = [{"custom_id": f"c{number}", "body": {"input": "x" * (size // 6)}} for number in range(6)]
    yield _rest("batch, large lines", *_REST["batch"][:2], {"model": MODEL, "input": large})
    keys = {f"k{number}": number for number in range(20)}
    lines = [{"custom_id": f"c{number}", "body": {}, **keys} for number in range(10_000)]
    yield _rest("batch, lines of many names", *_REST["batch"][:2], {"model": MODEL, "input": lines})
    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
    form = head + b"\xff" * size + b"\r\n--b--\r\n"
    upload = "/searchfoundation.v1.OpenAIBatchRestService/UploadFile"
    yield Worst("files, a long purpose", upload, HttpBody(data=form), "/openai/v1/files", form)
    query = batch_rest_pb2.ListBatchesByQueryRequest(limit=["1000"])
    yield Worst("batch, a long list", "/searchfoundation.v1.BatchRestService/ListBatches", query)


def _typed(size: int) -> Iterator[Worst]:
    text = Content(text=WORDS * (min(size, 11 * MIB) // len(WORDS)))
    wide = Content(text="x" * (2 * MIB) + "😀")
    many = [Content(text="x")] * 20_000
    echo = rerank_pb2.RerankOptions(return_documents=True, truncate=True)
    options = embed_pb2.EmbedOptions(truncate=True)
    lines = [
        batch_pb2.BatchLine(custom_id=f"c{number}", inputs=[Content(image=Media(url="x" * (size // 2500)))])
        for number in range(10_000)
    ]
    examples = [classify_pb2.TrainingExample(content=text, label="a")] * 2
    of = "/searchfoundation.v1.{}".format
    for inputs, what in (
        ([text], "one text"),
        ([wide] * (size // MIB // 2), "wide texts"),
        (many, "many texts"),
    ):
        embed = embed_pb2.EmbedRequest(model=MODEL, inputs=inputs, options=options)
        yield Worst(f"Embed, {what}", of("EmbedService/Embed"), embed)
        query = Content(text="q")
        rank = rerank_pb2.RerankRequest(model=MODEL, query=query, documents=inputs, options=echo)
        yield Worst(f"Rerank, {what} echoed", of("RerankService/Rerank"), rank)
        labels = classify_pb2.ClassifyRequest(model=MODEL, inputs=inputs, labels=["a", "b"])
        yield Worst(f"Classify, {what}", of("ClassifyService/Classify"), labels)
    train = classify_pb2.TrainRequest(model=MODEL, examples=examples[: size // (11 * MIB) + 1])
    yield Worst("Train, texts", of("ClassifyService/Train"), train)
    job = batch_pb2.CreateBatchRequest(model=MODEL, input=batch_pb2.BatchLines(lines=lines))
    yield Worst("CreateBatch, lines", of("BatchService/CreateBatch"), job)
    yield Worst("ListBatches", of("BatchService/ListBatches"), batch_pb2.ListBatchesRequest(limit=1000))


def _rest(name: str, method: str, path: str, fields: dict[str, Any]) -> Worst:
    data = json.dumps(fields, ensure_ascii=False).encode()
    return Worst(name, f"/searchfoundation.v1.{method}", HttpBody(data=data), path, data)

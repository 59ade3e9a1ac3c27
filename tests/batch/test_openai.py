"""Files and batches through OpenAI's own SDK: real services and Envoy."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from tests.batch import expected
from tests.stack import MODEL, Stack, wait_for


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("openai")) as up:
        up.serve("embed", "batch", SF_BATCH_CHUNK_TOKENS="400")
        up.gateway()
        yield up


@pytest.fixture(scope="module")
def ann(stack: Stack) -> Iterator[openai.OpenAI]:
    with _client(stack) as client:
        yield client


@pytest.fixture(scope="module")
def bob(stack: Stack) -> Iterator[openai.OpenAI]:
    with _client(stack) as client:
        yield client


def _client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/openai/v1", api_key=stack.create_key(), max_retries=0)


def line(name: str, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": MODEL, "input": "hello", **body},
    }


def upload(client: openai.OpenAI, *lines: Any) -> str:
    content = b"".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines
    )
    return client.files.create(file=("lines.jsonl", content), purpose="batch").id


def make(client: openai.OpenAI, file_id: str, **more: Any) -> Batch:
    return client.batches.create(
        input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h", **more
    )


def ended(client: openai.OpenAI, batch_id: str) -> Batch:
    wait_for(lambda: client.batches.retrieve(batch_id).status not in ("validating", "in_progress"))
    return client.batches.retrieve(batch_id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [json.loads(each) for each in client.files.content(file_id).iter_lines()]


def test_a_batch_from_upload_to_deletion(ann: openai.OpenAI) -> None:
    texts = expected.texts(40)
    given = [line(f"line-{n}", input=text) for n, text in enumerate(texts)]
    file_id = upload(ann, *given)
    uploaded = ann.files.retrieve(file_id)
    assert (uploaded.filename, uploaded.purpose, uploaded.status) == ("lines.jsonl", "batch", "processed")
    assert [json.loads(each) for each in ann.files.content(file_id).iter_lines()] == given
    made = make(ann, file_id, metadata={"run": "7"})
    assert (made.object, made.input_file_id, made.completion_window) == ("batch", file_id, "24h")
    done = ended(ann, made.id)
    assert (done.status, done.metadata, done.errors) == ("completed", {"run": "7"}, None)
    assert done.request_counts is not None
    assert done.request_counts.to_dict() == {"total": 40, "completed": 40, "failed": 0}
    assert done.error_file_id is None
    assert done.completed_at is not None
    assert made.created_at <= done.completed_at <= time.time()
    output = lines_of(ann, done.output_file_id)
    direct = ann.embeddings.create(model=MODEL, input=texts)
    assert [each["custom_id"] for each in output] == [f"line-{n}" for n in range(40)]
    for each, wanted in zip(output, direct.data, strict=True):
        assert (each["error"], each["response"]["status_code"]) == (None, 200)
        assert each["response"]["body"]["data"][0]["embedding"] == pytest.approx(wanted.embedding, abs=1e-5)
    listed = {each.id: each for each in ann.files.list()}
    assert listed[done.output_file_id or ""].purpose == "batch_output"
    assert listed[done.output_file_id or ""].bytes == len(
        ann.files.content(done.output_file_id or "").content
    )
    for each in (file_id, done.output_file_id or ""):
        assert ann.files.delete(each).deleted
        with pytest.raises(openai.NotFoundError):
            ann.files.retrieve(each)
        with pytest.raises(openai.NotFoundError):
            ann.files.content(each)


def test_a_line_gets_the_options_it_asks_for(ann: openai.OpenAI) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"dimensions": 8},
        {"encoding_format": "base64"},
        {"input": ["a", "b"], "dimensions": 8, "encoding_format": "float", "user": "me"},
    ]
    bad: list[tuple[Any, str]] = [
        (line("bad-1", model="text-embedding-3-small"), "'body.model' is"),
        ({**line("bad-2"), "url": "/v1/chat/completions"}, "'url' is \"/v1/chat/completions\""),
        (line("bad-3", task="retrieval.query"), "'body.task' is"),
        (line("0"), "Line 1 of this job has the same"),
        (b"not json\n", "The line is not valid JSON"),
    ]
    good = [line(str(n), **each) for n, each in enumerate(options)]
    done = ended(ann, make(ann, upload(ann, *good, *(each for each, _ in bad))).id)
    assert done.status == "completed"
    output = lines_of(ann, done.output_file_id)
    http = httpx.Client(
        base_url=str(ann.base_url), headers={"authorization": f"Bearer {ann.api_key}"}, timeout=100
    )
    with http:
        for each, sent in zip(output, good, strict=True):
            wanted = http.post("/embeddings", json=sent["body"]).json()
            found = each["response"]["body"]
            assert found["usage"] == wanted["usage"]
            for one, other in zip(found["data"], wanted["data"], strict=True):
                if isinstance(other["embedding"], str):
                    assert one["embedding"] == other["embedding"]
                else:
                    assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)
    errors = lines_of(ann, done.error_file_id)
    assert [each["error"]["line"] for each in errors] == [5, 6, 7, 8, 9]
    for each, (_, said) in zip(errors, bad, strict=True):
        assert each["error"]["message"].startswith(said)


def test_a_batch_without_one_good_line_fails(ann: openai.OpenAI) -> None:
    done = ended(ann, make(ann, upload(ann, line("a", input=[]), line("b", input=7))).id)
    assert (done.status, done.output_file_id) == ("failed", None)
    assert done.errors is not None
    assert done.errors.data is not None
    assert "Line 1: 'body.input' Input list cannot be empty." in (done.errors.data[0].message or "")
    assert len(lines_of(ann, done.error_file_id)) == 2


def test_a_batch_is_cancelled_and_its_input_is_kept_until_then(ann: openai.OpenAI) -> None:
    many = [line(f"line-{n}", input=text) for n, text in enumerate(expected.texts(4_000))]
    file_id = upload(ann, *many)
    made = make(ann, file_id)
    with pytest.raises(openai.ConflictError, match="is the input of batch"):
        ann.files.delete(file_id)
    cancelled = ann.batches.cancel(made.id)
    assert (cancelled.status, cancelled.cancelled_at is not None) == ("cancelled", True)
    with pytest.raises(openai.ConflictError):
        ann.batches.cancel(made.id)
    assert ann.files.delete(file_id).deleted


def test_lists_come_in_pages(bob: openai.OpenAI) -> None:
    files = [upload(bob, line("a")) for _ in range(5)]
    batches = [make(bob, each).id for each in files]
    for each in batches:
        ended(bob, each)
    assert [each.id for each in bob.batches.list(limit=2)] == batches[::-1]
    first = bob.batches.list(limit=2)
    assert (len(first.data), first.has_more) == (2, True)
    assert [each.id for each in bob.files.list(purpose="batch", limit=2)] == files[::-1]
    assert [each.id for each in bob.files.list(purpose="batch", order="asc", limit=3)] == files
    assert len(list(bob.files.list())) == 10


def test_what_is_not_served_is_refused_in_words(ann: openai.OpenAI) -> None:
    file_id = upload(ann, line("a"))
    for wrong, said in (
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
    ):
        given: Any = {"endpoint": "/v1/embeddings", "completion_window": "24h", **wrong}
        with pytest.raises(openai.UnprocessableEntityError, match=said):
            ann.batches.create(input_file_id=file_id, **given)
    with pytest.raises(openai.UnprocessableEntityError, match="purpose"):
        ann.files.create(file=("a.jsonl", b"{}"), purpose="assistants")
    with pytest.raises(openai.BadRequestError, match="nobody"):
        make(ann, upload(ann, line("a", model="nobody")))
    with pytest.raises(openai.UnprocessableEntityError, match="line 2, the first"):
        make(ann, upload(ann, b"\n", b"not json\n"))
    with pytest.raises(openai.UnprocessableEntityError, match="without lines"):
        make(ann, upload(ann, b""))
    http = httpx.Client(
        base_url=str(ann.base_url), headers={"authorization": f"Bearer {ann.api_key}"}, timeout=100
    )
    with http:
        for headers, body in (
            ({}, b"{}"),
            ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n"),
            ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n\r\nfile\r\n--x--"),
        ):
            assert http.post("/files", content=body, headers=headers).status_code == 422
        file = {"file": ("a.jsonl", b"{}"), "purpose": (None, "batch")}
        twice = [
            *file.items(),
            ("expires_after[seconds]", (None, "5")),
            ("expires_after[seconds]", (None, "6")),
        ]
        assert http.post("/files", files=twice).status_code == 422
        for path in (
            "/files?limit=",
            "/files?order=",
            "/files?order=up",
            "/batches?limit=",
            "/files?after=a&after=b",
        ):
            assert http.get(path).status_code == 422


def test_files_and_batches_belong_to_their_key(ann: openai.OpenAI, bob: openai.OpenAI) -> None:
    file_id = upload(ann, line("a"))
    batch = ended(ann, make(ann, file_id).id)
    for call in (
        lambda: bob.files.retrieve(file_id),
        lambda: bob.files.content(file_id),
        lambda: bob.files.delete(file_id),
        lambda: bob.files.content(batch.output_file_id or ""),
        lambda: bob.batches.retrieve(batch.id),
        lambda: bob.batches.cancel(batch.id),
        lambda: make(bob, file_id),
        lambda: bob.batches.list(after=batch.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()


def test_the_prefix_is_a_base_url_for_everything(ann: openai.OpenAI) -> None:
    assert [each.id for each in ann.models.list()] == [ann.models.retrieve(MODEL).id]
    with pytest.raises(openai.NotFoundError, match="nobody"):
        ann.models.retrieve("nobody")
    assert len(ann.embeddings.create(model=MODEL, input="x", dimensions=8).data[0].embedding) == 8

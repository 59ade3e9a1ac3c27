"""Jobs over REST: real services and Envoy, two keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.batch import expected
from tests.batch.conftest import Expect
from tests.stack import MODEL, Stack, wait_for

Answer = tuple[int, Any]

_ABOUT_A_JOB = (("GET", ""), ("DELETE", ""), ("GET", "/output"), ("GET", "/errors"))


@dataclass
class Caller:
    """REST calls with one key."""

    http: httpx.Client

    def create(self, **fields: Any) -> Answer:
        return self.call("POST", "/v1/batch/embeddings", json={"model": MODEL, **fields})

    def call(self, method: str, path: str, **arguments: Any) -> Answer:
        answer = self.http.request(method, path, **arguments)
        return answer.status_code, answer.json()

    def done(self, **fields: Any) -> dict[str, Any]:
        """Make a job and wait for its end."""
        status, job = self.create(**fields)
        assert status == 200, job
        path = f"/v1/batch/{job['batch_id']}"
        wait_for(lambda: self.call("GET", path)[1]["completed_at"] is not None)
        return self.call("GET", path)[1]

    def file(self, url: str) -> bytes:
        answer = self.http.get(url)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/x-ndjson"
        return answer.content


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("batch")) as up:
        up.serve("embed", "batch", SF_BATCH_CHUNK_TOKENS="400")
        up.gateway()
        yield up


@pytest.fixture(scope="module")
def ann(stack: Stack) -> Iterator[Caller]:
    yield from _caller(stack)


@pytest.fixture(scope="module")
def bob(stack: Stack) -> Iterator[Caller]:
    yield from _caller(stack)


def _caller(stack: Stack) -> Iterator[Caller]:
    headers = {"authorization": f"Bearer {stack.create_key()}"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=180) as http:
        yield Caller(http)


def test_a_job_from_beginning_to_end(stack: Stack, ann: Caller, expect: Expect) -> None:
    given = expected.lines(expected.texts(300))
    made = ann.http.post("/v1/batch/embeddings", json={"model": MODEL, "input": given})
    job = made.json()
    assert made.headers["location"] == f"/v1/batch/{job['batch_id']}"
    assert int(made.headers["retry-after"]) > 0
    assert (job["status"], job["model"], job["stats"]["total"]) == ("pending", MODEL, 300)
    path = f"/v1/batch/{job['batch_id']}"
    wait_for(lambda: ann.call("GET", path)[1]["status"] == "completed")
    job = ann.call("GET", path)[1]
    assert job["output_url"] == f"{stack.url}{path}/output"
    assert job["error_file_url"] is None
    assert job["error"] is None
    output = ann.file(job["output_url"])
    assert output == expect(job["batch_id"], 300)
    lines = [json.loads(line) for line in output.splitlines()]
    tokens = sum(line["response"]["body"]["usage"]["total_tokens"] for line in lines)
    assert job["stats"] == {"total": 300, "completed": 300, "failed": 0, "total_tokens": tokens}
    assert ann.call("GET", f"{path}/errors")[0] == 404


@pytest.fixture(scope="module")
def done(ann: Caller) -> tuple[str, bytes]:
    """URL and content of an output of several parts."""
    job = ann.done(input=expected.lines(expected.texts(200)))
    return job["output_url"], ann.file(job["output_url"])


def test_a_file_says_what_it_is(ann: Caller, done: tuple[str, bytes]) -> None:
    url, output = done
    headers = ann.http.get(url).headers
    name = url.split("/")[-2]
    assert headers["accept-ranges"] == "bytes"
    assert headers["content-disposition"] == f'attachment; filename="{name}_output.jsonl"'
    assert headers["etag"] == f'"{name}-output"'
    assert int(headers["content-length"]) == len(output)
    assert not [each for each in headers if each.startswith("sf-")]


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, None),
        ("bytes=1000-250000", 1000, 250_001),
        ("bytes=200000-", 200_000, None),
        ("bytes=-500", -500, None),
        ("bytes=5-99999999999", 5, None),
    ],
)
def test_parts_of_a_file(
    ann: Caller, done: tuple[str, bytes], asked: str, start: int, end: int | None
) -> None:
    url, output = done
    answer = ann.http.get(url, headers={"Range": asked})
    wanted = output[start:end]
    assert (answer.status_code, answer.content) == (206, wanted)
    begin = start % len(output)
    assert answer.headers["content-range"] == f"bytes {begin}-{begin + len(wanted) - 1}/{len(output)}"
    assert int(answer.headers["content-length"]) == len(wanted)
    assert not [each for each in answer.headers if each.startswith("sf-")]


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "bytes=0-1,5-6"},
        {"Range": "lines=0-1"},
        {"Range": "bytes=9-3"},
        {"Range": "bytes=-"},
        {"Range": "bytes=x-"},
        {"Range": "bytes=0-1", "If-Range": '"another"'},
    ],
)
def test_ranges_that_mean_the_whole_file(
    ann: Caller, done: tuple[str, bytes], headers: dict[str, str]
) -> None:
    url, output = done
    answer = ann.http.get(url, headers=headers)
    assert (answer.status_code, answer.content) == (200, output)
    assert "content-range" not in answer.headers


def test_a_range_of_the_file_that_was_meant(ann: Caller, done: tuple[str, bytes]) -> None:
    url, output = done
    etag = ann.http.get(url).headers["etag"]
    answer = ann.http.get(url, headers={"Range": "bytes=100-", "If-Range": etag})
    assert (answer.status_code, answer.content) == (206, output[100:])


def test_a_range_behind_the_end(ann: Caller, done: tuple[str, bytes]) -> None:
    url, output = done
    answer = ann.http.get(url, headers={"Range": f"bytes={len(output)}-"})
    assert (answer.status_code, answer.json()["code"]) == (416, "RANGE_NOT_SATISFIABLE")
    assert answer.headers["content-range"] == f"bytes */{len(output)}"


@pytest.mark.parametrize(
    ("asked", "status", "length"),
    [({}, 200, None), ({"Range": "bytes=5-9"}, 206, 5), ({"Range": "bytes=-7"}, 206, 7)],
    ids=str,
)
def test_the_head_of_a_file(
    ann: Caller, done: tuple[str, bytes], asked: dict[str, str], status: int, length: int | None
) -> None:
    url, output = done
    head, whole = ann.http.head(url, headers=asked), ann.http.get(url, headers=asked)
    assert (head.status_code, head.content) == (status, b"")
    assert int(head.headers["content-length"]) == (len(output) if length is None else length)
    same = ("content-length", "content-type", "content-range", "content-disposition", "etag", "accept-ranges")
    assert [head.headers.get(name) for name in same] == [whole.headers.get(name) for name in same]


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("If-None-Match", "{etag}", 304),
        ("If-None-Match", 'W/{etag}, "other"', 304),
        ("If-None-Match", "*", 304),
        ("If-None-Match", '"other"', 200),
        ("If-Match", "{etag}", 200),
        ("If-Match", '"other", {etag}', 200),
        ("If-Match", "*", 200),
        ("If-Match", '"other"', 412),
        ("If-Match", "W/{etag}", 412),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_files_on_conditions(
    ann: Caller, done: tuple[str, bytes], method: str, name: str, value: str, status: int
) -> None:
    url, output = done
    etag = ann.http.head(url).headers["etag"]
    answer = ann.http.request(method, url, headers={name: value.replace("{etag}", etag)})
    assert answer.status_code == status
    if status == 200:
        assert answer.content == (output if method == "GET" else b"")
    elif status == 304:
        assert (answer.content, answer.headers["etag"]) == (b"", etag)
        assert "content-length" not in answer.headers
    elif method == "GET":
        assert answer.json()["code"] == "PRECONDITION_FAILED"


def test_the_head_of_everything_that_is_read(ann: Caller, bob: Caller, done: tuple[str, bytes]) -> None:
    job = done[0].rpartition("/")[0]
    for path in (job, f"{job}/", "/v1/batches", "/v1/batches?limit=1"):
        head, whole = ann.http.head(path), ann.http.get(path)
        assert (head.status_code, head.content, whole.status_code) == (200, b"", 200)
        assert head.headers["content-type"] == "application/json"
    for path in (job, done[0]):
        for spelt in (path, f"{path}/", path.replace("/v1/batch/", "//v1//batch//")):
            assert bob.http.get(spelt).status_code == bob.http.head(spelt).status_code == 404
    assert ann.http.put(job).headers["allow"] == "GET, HEAD, DELETE"


@pytest.mark.parametrize("offset", [0, 1, 1000, 200_000])
def test_a_file_from_a_byte_on(ann: Caller, done: tuple[str, bytes], offset: int) -> None:
    url, output = done
    assert ann.file(f"{url}?offset={offset}") == output[offset:]
    assert ann.file(f"{url}?offset={len(output) + offset}") == b""


@pytest.mark.parametrize("offset", ["-1", "x", "1e3"])
def test_offsets_that_are_none(ann: Caller, done: tuple[str, bytes], offset: str) -> None:
    status, body = ann.call("GET", f"{done[0]}?offset={offset}")
    assert (status, body["errors"][0]["field"]) == (422, "query -> offset")


def test_vectors_are_those_of_the_embeddings_path(ann: Caller) -> None:
    job = ann.done(
        input=[{"custom_id": "a", "method": "POST", "url": "/", "body": {"input": ["x", {"text": "y"}]}}]
    )
    line = json.loads(ann.file(job["output_url"]))
    status, direct = ann.call("POST", "/v1/embeddings", json={"model": MODEL, "input": ["x", "y"]})
    assert status == 200
    assert line["response"]["body"] == direct


def test_bad_lines_go_to_the_error_file(ann: Caller) -> None:
    good = {"body": {"input": "good"}}
    job = ann.done(
        input=[
            {"custom_id": "1", **good},
            good,
            {"custom_id": "1", **good},
            {"custom_id": 7, **good},
            {"custom_id": "", **good},
            {"custom_id": "no body"},
            {"custom_id": "list", "body": []},
            {"custom_id": "no input", "body": {}},
            {"custom_id": "number", "body": {"input": 5}},
            {"custom_id": "image", "body": {"input": [{"image": "x"}]}},
            {"custom_id": "empty", "body": {"input": []}},
            {"custom_id": "long", "body": {"input": "x" * (5 << 20)}},
            {"custom_id": "last", **good},
        ]
    )
    assert (job["status"], job["stats"]["completed"], job["stats"]["failed"]) == ("completed", 2, 11)
    output = [json.loads(line)["custom_id"] for line in ann.file(job["output_url"]).splitlines()]
    assert output == ["1", "last"]
    errors = [json.loads(line) for line in ann.file(job["error_file_url"]).splitlines()]
    assert [error["custom_id"] for error in errors] == [
        *(None, "1", 7, "", "no body", "list", "no input", "number", "image", "empty", None)
    ]
    assert [error["error"]["line"] for error in errors] == list(range(2, 13))
    assert errors[1]["error"]["message"] == "Line 1 of this job has the same 'custom_id'."
    assert {error["error"]["code"] for error in errors} == {"VALIDATION_ERROR"}
    assert all(error["response"] is None and error["error"]["message"] for error in errors)


def test_a_number_for_a_name_is_echoed_digit_by_digit(ann: Caller) -> None:
    names = ["12345678901234567890123", "-7", "0.10"]
    lines = ",\n".join(f'{{"custom_id":\n{name}, "body": {{"input": "x"}}}}' for name in names)
    body = f'{{"model": "{MODEL}", "input": [\n{lines}\n]}}'
    status, job = ann.call("POST", "/v1/batch/embeddings", content=body)
    assert status == 200, job
    path = f"/v1/batch/{job['batch_id']}"
    wait_for(lambda: ann.call("GET", path)[1]["status"] == "failed")
    errors = ann.file(f"{path}/errors").decode().strip().split("\n")
    assert [f'"custom_id":{name},' in line for name, line in zip(names, errors, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, f"body -> {MODEL}"),
        ({"input": [{}], "input_url": "https://example.com"}, f"body -> {MODEL}"),
        ({"input": []}, f"body -> {MODEL} -> input"),
        ({"input": [{}] * 10_001}, f"body -> {MODEL} -> input"),
        ({"input": ["x"]}, f"body -> {MODEL} -> input -> 0"),
        ({"input": "x"}, f"body -> {MODEL} -> input"),
        ({"input_url": 5}, f"body -> {MODEL} -> input_url"),
        ({"input_url": "ftp://example.com"}, f"body -> {MODEL}"),
        ({"input": [{}], "normalized": "yes"}, f"body -> {MODEL} -> normalized"),
        ({"input": [{}], "webhook_url": "http://10.0.0.1/"}, f"body -> {MODEL} -> webhook_url"),
        ({"input": [{}], "webhook_url": "nonsense"}, f"body -> {MODEL} -> webhook_url"),
    ],
)
def test_requests_that_make_no_job(ann: Caller, fields: dict[str, Any], field: str) -> None:
    status, body = ann.create(**fields)
    assert (status, body["code"]) == (422, "VALIDATION_ERROR")
    assert body["errors"][0]["field"] == field


def test_a_model_that_is_not_there(ann: Caller) -> None:
    status, body = ann.create(model="nobody", input=[{}])
    assert (status, body["code"]) == (400, "INPUT_MODEL_NOT_FOUND")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("https://127.0.0.1/x", "127.0.0.1"),
        ("http://169.254.169.254/latest", "169.254"),
        ("s3://somebody/secret.jsonl", "SF_BATCH_INPUT_BUCKETS"),
    ],
)
def test_inputs_that_must_not_be_read(ann: Caller, url: str, word: str) -> None:
    job = ann.done(input_url=url)
    assert job["status"] == "failed"
    assert word in job["error"]
    assert job["output_url"] is None


def test_files_before_the_end_and_cancelling(ann: Caller) -> None:
    given = expected.lines(expected.texts(4_000))
    _, job = ann.create(input=given)
    path = f"/v1/batch/{job['batch_id']}"
    status, body = ann.call("GET", f"{path}/output")
    assert (status, body["code"]) == (409, "CONFLICT_RESOURCE_BUSY")
    wait_for(lambda: ann.call("GET", path)[1]["stats"]["completed"] > 0)
    status, job = ann.call("DELETE", path)
    assert (status, job["status"]) == (200, "cancelled")
    done = job["stats"]["completed"]
    assert 0 < done < 4_000
    assert len(ann.file(job["output_url"]).splitlines()) == done
    status, body = ann.call("DELETE", path)
    assert (status, body["code"]) == (409, "CONFLICT_STATE")
    assert ann.call("GET", path)[1] == job


def test_jobs_belong_to_their_key(ann: Caller, bob: Caller) -> None:
    job = ann.done(input=[{"custom_id": "a", "body": {"input": "x"}}])
    path = f"/v1/batch/{job['batch_id']}"
    for method, end in _ABOUT_A_JOB:
        status, body = bob.call(method, path + end)
        assert (status, body["code"]) == (404, "RESOURCE_NOT_FOUND")
        assert job["batch_id"] in body["detail"]
    mine = bob.done(input=[{"custom_id": "a", "body": {"input": "x"}}])
    assert bob.call("GET", "/v1/batches")[1] == [mine]
    listed = ann.call("GET", "/v1/batches?limit=1")[1]
    assert listed == [job]
    times = [each["created_at"] for each in ann.call("GET", "/v1/batches")[1]]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("limit", ["", "0", "-1", "x", "1.5", "1&limit=1"])
def test_limits_that_are_none(ann: Caller, limit: str) -> None:
    status, body = ann.call("GET", f"/v1/batches?limit={limit}")
    assert (status, body["errors"][0]["field"]) == (422, "query -> limit")


@pytest.mark.parametrize("name", ["x", "batch_00", "batch_" + "0" * 32, "embeddings"])
def test_ids_of_no_job(ann: Caller, name: str) -> None:
    for method, end in _ABOUT_A_JOB:
        assert ann.call(method, f"/v1/batch/{name}{end}")[0] == 404


def test_without_a_key(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/v1/batches", timeout=100).status_code == 401

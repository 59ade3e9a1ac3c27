"""Input by URL through whole jobs: servers that misbehave, and files with every kind of bad line."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
import pytest_asyncio
from searchfoundation.v1 import batch_pb2

from services.batch import inputs
from tests.batch.rig import Rig, rig, until
from tests.media.web import Handler, Request, Web, answer, head, web
from tests.rig import settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_BYTES = 8 << 20
BOM = b"\xef\xbb\xbf"


async def _without_end(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200, None))
    while True:
        writer.write(b"x" * 65_536)
        await writer.drain()


async def _promising(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200, 1 << 40))


async def _breaking_off(_: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200, 1_000) + b'{"custom_id": "a", "body": {"input": "x"}}\n')
    writer.close()


def line(name: Any, text: Any = "x") -> bytes:
    return json.dumps({"custom_id": name, "body": {"input": text}}).encode()


def redirect(to: str) -> Handler:
    return answer(b"", 302, Location=to)


PAGES: dict[str, Handler] = {
    "/endless": _without_end,
    "/declared": _promising,
    "/bomb": answer(gzip.compress(bytes(64 << 20), 9)),
    "/encoded-bomb": answer(gzip.compress(bytes(64 << 20), 9), Content_Encoding="gzip"),
    "/half-gzip": answer(gzip.compress(line("a"))[:-6]),
    "/metadata": redirect("http://169.254.169.254/latest"),
    "/inside": redirect("http://10.0.0.1/"),
    "/file": redirect("file:///etc/passwd"),
    "/loop": redirect("/loop"),
    "/cut": _breaking_off,
    "/denied": answer(b"", 403),
    "/broken": answer(b"", 503),
    "/too-many": answer(b"{}\n" * 50_001),
    "/most": answer(b"{}\n" * 50_000),
    "/empty": answer(b""),
    "/blank": answer(BOM + b"\r\n  \n\n"),
    "/packed": answer(gzip.compress(line("a") + b"\n")),
    "/moved": redirect("/packed"),
    "/page": answer(b"<html>\n<body>Please log in</body></html>\n"),
    "/zip": answer(b"PK\x03\x04" + bytes(range(14, 200))),
    "/utf-16": answer((line("a").decode() + "\n" + line("b").decode() + "\n").encode("utf-16")),
    "/array": answer(b"\n[" + line("a") + b",\n" + line("b") + b",\n" + line("c") + b"]\n"),
    "/names": answer(
        b"\n".join(
            (
                *map(line, ("a\u2028b", "a\u2029b", "a\u0085b", "a\u001cb", "ä")),
                *map(line, (7, 12345678901234567890123, 1.5, [1], True)),
                '{"custom_id": "\u2028", "body": 5}'.encode(),
            )
        )
    ),
    "/lines": answer(
        BOM
        + b"\r\n".join(
            (
                *(line("a"), b"", line("a", "again"), b'{"body": {"input": "x"}}', b"not JSON", b"[]"),
                *(line("long", "x" * (5 << 20)), b"   ", line("b"), b'{"custom_id": "c"}', BOM + line("d")),
                *(line(""), line("e", ["x", "y"]), line("f", [])),
            )
        )
    ),
}


@dataclass
class System:
    rig: Rig
    web: Web
    folder: Path

    def url(self, path: str) -> str:
        return self.web.url(path)

    async def ended(self, job: str) -> dict[str, Any]:
        async def reached() -> bool:
            return (await self.rig.status(job))["completed_at"] is not None

        await until(reached)
        return await self.rig.status(job)

    async def lines(self, job: str, file: int) -> list[Any]:
        return [orjson.loads(each) for each in (await self.rig.download(job, file)).splitlines()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    async def page(request: Request, writer: asyncio.StreamWriter) -> None:
        await PAGES.get(request.target, answer(b"", 404))(request, writer)

    folder = tmp_path_factory.mktemp("inputs")
    chosen = settings(
        data_dir=folder,
        auth=True,
        fetch_allow_networks=("127.0.0.1/32",),
        batch_max_input_bytes=MAX_BYTES,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "FETCH_SECONDS", 0.01)
        async with web(page) as site, rig(chosen) as up:
            yield System(await up.of_a_key(), site, folder / "objects" / "batches")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/endless", "it is larger than 8,388,608 bytes"),
        ("/declared", "it is larger than 8,388,608 bytes"),
        ("/bomb", "it unpacks to more than 8,388,608 bytes"),
        ("/encoded-bomb", "it unpacks to more than 8,388,608 bytes"),
        ("/half-gzip", "its gzip content breaks off"),
        ("/metadata", "the host '169.254.169.254' leads to an address that is not public"),
        ("/inside", "the host '10.0.0.1' leads to an address that is not public"),
        ("/file", "only http:// and https:// URLs are fetched"),
        ("/loop", "it redirects more than 3 times"),
        ("/cut", "the connection broke"),
        ("/denied", "it answered with status 403"),
        ("/nothing", "it answered with status 404"),
        ("/broken", "it answered with status 503"),
    ],
)
async def test_a_file_that_cannot_be_had_fails_the_job(system: System, path: str, said: str) -> None:
    url = system.url(path)
    await _fails(system, url, f"Cannot fetch '{url}': {said}.")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/too-many", "The input has more than 50,000 lines."),
        ("/empty", "The input has no lines."),
        ("/blank", "The input has no lines."),
    ],
)
async def test_a_file_that_is_no_input_fails_the_job(system: System, path: str, said: str) -> None:
    await _fails(system, system.url(path), said)


async def test_a_server_that_is_down_fails_the_job(system: System) -> None:
    async with web(answer(b"")) as gone:
        url = gone.url("/in.jsonl")
    await _fails(system, url, f"Cannot fetch '{url}': no connection could be made.")


async def _fails(system: System, url: str, said: str) -> None:
    job = await system.rig.create(input_url=url)
    status = await system.ended(job)
    assert (status["status"], status["error"]) == ("failed", said)
    assert (status["output_url"], status["error_file_url"]) == (None, None)
    assert status["stats"] == {"total": 0, "completed": 0, "failed": 0, "total_tokens": 0}

    async def gone() -> bool:
        return not (system.folder / job).exists()

    await until(gone)


@pytest.mark.parametrize("path", ["/packed", "/moved"])
async def test_packed_and_moved_files_are_read(system: System, path: str) -> None:
    job = await system.rig.create(input_url=system.url(path))
    assert (await system.ended(job))["status"] == "completed"
    assert [found["custom_id"] for found in await system.lines(job, batch_pb2.BATCH_FILE_OUTPUT)] == ["a"]
    assert not list(system.folder.rglob(".*")), "files half written"


async def test_every_kind_of_bad_line_is_told_and_the_others_are_embedded(system: System) -> None:
    job = await system.rig.create(input_url=system.url("/lines"))
    status = await system.ended(job)
    assert status["status"] == "completed"
    stats = {"total": 12, "completed": 3, "failed": 9}
    assert {name: status["stats"][name] for name in stats} == stats
    output = await system.lines(job, batch_pb2.BATCH_FILE_OUTPUT)
    assert [found["custom_id"] for found in output] == ["a", "b", "e"]
    assert [len(found["response"]["body"]["data"]) for found in output] == [1, 1, 2]
    errors = await system.lines(job, batch_pb2.BATCH_FILE_ERRORS)
    told = [(found["error"]["line"], found["custom_id"], found["error"]["message"]) for found in errors]
    assert told == [
        (3, "a", "Line 1 of this job has the same 'custom_id'."),
        (4, None, "'custom_id' should be a text that is not empty."),
        (5, None, "The line is not valid JSON: invalid literal, expected 'null' (column 1)."),
        (6, None, "The line should be a JSON object."),
        (7, None, "The line is longer than 1,048,576 bytes."),
        (10, "c", "'body' should be an object with 'input'."),
        (11, None, "The line is not valid JSON: UTF-8 byte order mark (BOM) is not supported (column 1)."),
        (12, "", "'custom_id' should be a text that is not empty."),
        (14, "f", "'body.input' Input list cannot be empty. Provide at least one item."),
    ]
    for found in errors:
        assert found["error"]["code"] == "VALIDATION_ERROR"
        assert found["response"] is None
        assert found["id"].startswith("batch_req_")


async def test_names_come_back_as_they_were_written(system: System) -> None:
    job = await system.rig.create(input_url=system.url("/names"))
    assert (await system.ended(job))["status"] == "completed"
    output = await system.rig.download(job)
    names = ["a\u2028b", "a\u2029b", "a\u0085b", "a\u001cb", "ä"]
    assert [orjson.loads(each)["custom_id"] for each in output.decode().splitlines()] == names
    errors = (await system.rig.download(job, batch_pb2.BATCH_FILE_ERRORS)).decode()
    assert [json.loads(each)["custom_id"] for each in errors.splitlines()] == [
        *(7, 12345678901234567890123, 1.5, None, True, "\u2028")
    ]
    assert "12345678901234567890123" in errors


@pytest.mark.parametrize(
    ("path", "total", "said"),
    [
        ("/page", 2, "Line 1: The line is not valid JSON: "),
        ("/zip", 1, "Line 1: The line is not valid JSON: "),
        ("/utf-16", 3, "Line 1: The line is not UTF-8 but, by its bytes, UTF-16. "),
        ("/array", 3, "Line 2: The line is not valid JSON: "),
    ],
)
async def test_a_file_without_one_good_line_fails_the_job(
    system: System, path: str, total: int, said: str
) -> None:
    job = await system.rig.create(input_url=system.url(path))
    status = await system.ended(job)
    assert status["status"] == "failed"
    assert status["error"].startswith(f"No line could be embedded. {said}")
    assert status["stats"] == {"total": total, "completed": 0, "failed": total, "total_tokens": 0}
    assert status["output_url"] is None
    assert status["error_file_url"].endswith("/errors")
    assert len(await system.lines(job, batch_pb2.BATCH_FILE_ERRORS)) == total
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.rig.download(job)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("form", ["HTTP{}", "Http{}", " http{}\n", "\thttp{} "])
async def test_pasted_urls_are_read(system: System, form: str) -> None:
    job = await system.rig.create(input_url=form.format(system.url("/packed").removeprefix("http")))
    assert (await system.ended(job))["status"] == "completed"


async def test_fifty_thousand_lines_are_taken(system: System) -> None:
    job = await system.rig.create(input_url=system.url("/most"))

    async def counted() -> bool:
        return (await system.rig.status(job))["stats"]["total"] == 50_000

    await until(counted)
    assert (await system.rig.status(job))["status"] == "processing"
    await system.rig.cancel(job)

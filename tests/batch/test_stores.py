"""Where files are kept: a folder, a bucket over HTTP, and either while it refuses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import grpc.aio
import httpx
import orjson
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from moto.server import ThreadedMotoServer
from searchfoundation.v1 import batch_rest_pb2

from services.core.settings import ConfigurationError, Settings
from services.core.storage.objects import (
    FileStore,
    ObjectMissingError,
    ObjectStore,
    ObjectStoreError,
    open_store,
)
from tests.batch import expected
from tests.batch.rig import rig, until
from tests.rig import settings, told


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket on an emulator; its address and keys are in the environment."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    variables = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": url,
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        httpx.put(f"{url}/files", timeout=100).raise_for_status()
        yield "s3://files/some/prefix"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return FileStore(tmp_path)
    return open_store(Settings(object_store=request.getfixturevalue("s3")))


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_objects_come_back(store: ObjectStore) -> None:
    await store.put("a/b/one", b"0123456789")
    assert await store.get("a/b/one", 2, 3) == b"234"
    assert b"".join([piece async for piece in store.stream("a/b/one")]) == b"0123456789"
    assert b"".join([piece async for piece in store.stream("a/b/one", 7)]) == b"789"
    large = os.urandom(6 << 20)
    assert await store.put_stream("a/b/two", _pieces(large[:5], large[5:])) == len(large)
    assert b"".join([piece async for piece in store.stream("a/b/two")]) == large
    await store.put("a/b/one", b"new")
    assert await store.get("a/b/one", 0, 10) == b"new"


async def test_objects_go(store: ObjectStore) -> None:
    for name in ("c/d/one", "c/d/e/two", "c/dd"):
        await store.put(name, b"x")
    await store.delete(["c/d/one", "c/d/nothing"])
    await store.delete_all("c/d")
    await store.delete_all("c/none")
    assert await store.get("c/dd", 0, 1) == b"x"
    for name in ("c/d/one", "c/d/e/two"):
        with pytest.raises(ObjectMissingError):
            await store.get(name, 0, 1)


async def test_a_stream_that_breaks_leaves_nothing(store: ObjectStore) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"x" * 10
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        await store.put_stream("f/g", broken())
    with pytest.raises(ObjectMissingError):
        await store.get("f/g", 0, 1)


async def test_a_folder_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = FileStore(tmp_path / "file")
    with pytest.raises(ObjectStoreError):
        await store.put("a", b"x")


async def test_a_bucket_that_is_away(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_RETRIES", "0")
    store = open_store(Settings(object_store="s3://files"))
    with pytest.raises(ObjectStoreError):
        await store.put("a", b"x")


@pytest.mark.parametrize("url", ["files", "https://files", "s3://", "file:///x"])
def test_urls_of_no_store(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SF_OBJECT_STORE"):
        open_store(Settings(object_store=url))


async def test_urls_of_google_are_signed_with_the_account_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Signature version 4, checked by its published description."""
    private = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    account = {
        "type": "service_account",
        "private_key": private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        "private_key_id": "1",
        "client_email": "batch@house.example",
    }
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", orjson.dumps(account).decode())
    signed = await open_store(Settings(object_store="gs://files/jobs")).signed_url("a/output.jsonl", 600)
    assert signed is not None
    url = urlsplit(signed)
    assert (
        f"{url.scheme}://{url.netloc}{url.path}" == "https://storage.googleapis.com/files/jobs/a/output.jsonl"
    )
    query, _, signature = url.query.rpartition("&X-Goog-Signature=")
    fields = dict(parse_qsl(query))
    assert fields["X-Goog-Expires"] == "600"
    scope = fields["X-Goog-Credential"].removeprefix("batch@house.example/")
    asked = f"GET\n{url.path}\n{query}\nhost:{url.netloc}\n\nhost\nUNSIGNED-PAYLOAD"
    text = "\n".join(
        ("GOOG4-RSA-SHA256", fields["X-Goog-Date"], scope, hashlib.sha256(asked.encode()).hexdigest())
    )
    private.public_key().verify(bytes.fromhex(signature), text.encode(), padding.PKCS1v15(), hashes.SHA256())


_NO_KEYS = ["", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a/..", "a\0b"]


@pytest.mark.parametrize("key", _NO_KEYS)
async def test_texts_that_are_no_keys(store: ObjectStore, key: str) -> None:
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: store.put(key, b"x"),
        lambda: store.put_stream(key, _pieces(b"x")),
        lambda: store.get(key, 0, 1),
        lambda: anext(store.stream(key)),
        lambda: store.delete([key]),
        lambda: store.delete_all(key),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no key"):
            await call()


async def test_a_job_with_its_files_in_a_bucket(tmp_path: Path, s3: str) -> None:
    chosen = settings(data_dir=tmp_path, object_store=s3, batch_input_buckets=("s3://files/inputs",))
    async with rig(chosen) as up:
        job = await up.create(expected.lines(expected.texts(40)))
        status = await up.wait(job)
        async with httpx.AsyncClient(timeout=100) as http:
            fetched = (await http.get(status["output_url"])).raise_for_status().content
        assert fetched == await up.download(job)
        assert len(fetched.splitlines()) == 40
        await open_store(Settings(object_store="s3://files/inputs")).put(
            "in.jsonl", b'{"custom_id": "a", "body": {"input": "x"}}\n\n{"custom_id": "b"}'
        )
        status = await up.wait(await up.create(input_url="s3://files/inputs/in.jsonl"))
        assert (status["stats"]["completed"], status["stats"]["failed"]) == (1, 1)
        await open_store(Settings(object_store="s3://files")).put("secret.jsonl", b'{"custom_id": "secret"}')
        for url, said in (
            ("s3://files/inputs-not/in.jsonl", "SF_BATCH_INPUT_BUCKETS"),
            ("s3://files/inputs/none.jsonl", "There is no object 's3://files/inputs/none.jsonl'."),
            ("s3://files/inputs/../secret.jsonl", "names no object"),
            ("s3://files/inputs/%2e%2e/secret.jsonl", "There is no object"),
            ("s3://files/inputs/", "names no object"),
            ("s3://other/in.jsonl", "SF_BATCH_INPUT_BUCKETS"),
        ):
            assert said in (await up.wait(await up.create(input_url=url), "failed"))["error"]


async def test_a_job_waits_while_its_files_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(settings(data_dir=tmp_path, batch_chunk_tokens=100)) as up:
        given = expected.lines(expected.texts(120))
        job = await up.create(given)
        await _until(lambda: any((tmp_path / "objects" / "batches" / job).glob("parts/*")))
        parts = tmp_path / "objects" / "batches" / job / "parts"
        aside = parts.rename(tmp_path / "aside")
        parts.write_bytes(b"in the way")
        await _until(lambda: "waits for the object store" in caplog.text)
        assert (await up.status(job))["stats"]["completed"] < 120
        parts.unlink()
        aside.rename(parts)
        status = await up.wait(job)
        assert status["stats"] | {"total_tokens": 0} == {
            "total": 120, "completed": 120, "failed": 0, "total_tokens": 0
        }  # fmt: skip
        names = [line["custom_id"] for line in given]
        assert [orjson.loads(line)["custom_id"] for line in (await up.download(job)).splitlines()] == names


async def test_no_job_is_made_whose_input_cannot_be_written(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path)) as up:
        (tmp_path / "objects").write_bytes(b"in the way")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.create([{"custom_id": "a", "body": {"input": "x"}}])
        assert told(caught.value)[0] == 503
        listed = await up.rest.ListBatches(batch_rest_pb2.ListBatchesByQueryRequest())
        assert orjson.loads(listed.data) == []


async def _until(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await until(holds)

"""What one key takes of what all share: places of webhooks and fetches, jobs, lines, bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import orjson
import pytest
from searchfoundation.v1 import batch_rest_pb2, ops_pb2

from services.core.access.key_table import KeyTable
from services.core.settings import Tier
from tests.batch import expected
from tests.batch.rig import Rig, rig, until
from tests.media.web import Request, answer, head, web
from tests.rig import settings, told

_LINES = [{"custom_id": "a", "body": {"input": "x"}}]


async def test_slow_servers_do_not_hold_the_jobs_of_others(tmp_path: Path) -> None:
    """Nine keys take every place that they can have, and more; a tenth is served, by URL and without."""

    async def page(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.target == "/quick":
            await answer(b'{"custom_id": "a", "body": {"input": "x"}}')(request, writer)
            return
        writer.write(head(200, 1_000_000))
        await writer.drain()
        await asyncio.sleep(3600)

    chosen = settings(data_dir=tmp_path, auth=True, fetch_allow_networks=("127.0.0.1/32",))
    async with web(page) as site, rig(chosen) as up:
        slow = [(await up.of_a_key()) for _ in range(9)]
        jobs = [(each, await each.create(input_url=site.url("/slow"))) for each in slow for _ in range(6)]

        async def held() -> bool:
            return len(site.requests) >= 9 * 4

        await until(held)
        bob = await up.of_a_key()
        await bob.wait(await bob.create(input_url=site.url("/quick")))
        await bob.wait(await bob.create([{"custom_id": "a", "body": {"input": "x"}}]))
        assert {(await each.status(job))["status"] for each, job in jobs} == {"pending"}


async def test_a_receiver_that_is_down_does_not_silence_the_webhooks_of_others(tmp_path: Path) -> None:
    """More jobs of one key wait for their receiver than there are places; another key is told at once."""
    told: list[str] = []

    async def page(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.target == "/up":
            told.append(orjson.loads(request.body)["batch_id"])
        await answer(b"", 503 if request.target == "/down" else 204)(request, writer)

    chosen = settings(data_dir=tmp_path, auth=True, fetch_allow_networks=("127.0.0.1/32",))
    async with web(page) as site, rig(chosen) as up:
        ann, bob = await up.of_a_key(), await up.of_a_key()
        waiting = [await ann.create(_LINES, webhook_url=site.url("/down")) for _ in range(70)]

        async def tried() -> bool:
            return len(site.requests) >= len(waiting)

        await until(tried)
        job = await bob.create(_LINES, webhook_url=site.url("/up"))

        async def heard() -> bool:
            return told == [job]

        await until(heard)


async def _refused(up: Rig, *given: Any, **fields: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await up.create(*given, **fields)
    status, body = told(caught.value)
    assert (status, body["code"]) == (403, "AUTHZ_RESOURCE_LIMIT_EXCEEDED")
    return body["detail"]


async def _quotas(up: Rig) -> dict[str, int]:
    answered = await up.rest.GetQuota(batch_rest_pb2.QuotaRequest(), metadata=up.metadata)
    return {name: figure["used"] for name, figure in orjson.loads(answered.data)["quotas"].items()}


async def test_a_key_has_no_more_than_its_tier_allows(tmp_path: Path) -> None:
    """Each quota is named when it is reached, and free again with what held it."""
    small = Tier(unfinished_jobs=2, unfinished_lines=50, unfinished_webhooks=1, stored_bytes=10_000)

    async def page(request: Request, writer: asyncio.StreamWriter) -> None:
        if request.target == "/lines":
            await answer(b"{}\n" * 49)(request, writer)
        elif request.target == "/large":
            await answer(b" " * 9_000 + b"{}\n" * 5)(request, writer)
        elif request.target == "/slow":
            writer.write(head(200, 1_000_000))
            await writer.drain()
            await asyncio.sleep(3600)

    chosen = settings(
        data_dir=tmp_path,
        auth=True,
        tiers={"small": small},
        default_tier="small",
        fetch_allow_networks=("127.0.0.1/32",),
    )
    async with web(page) as site, rig(chosen) as up:
        ann, bob = await up.of_a_key("small"), await up.of_a_key("small")
        slow = await ann.create(input_url=site.url("/slow"), webhook_url=site.url("/slow"))
        said = await _refused(ann, _LINES, webhook_url=site.url("/slow"))
        assert "Current: 1 webhooks not yet told, limit: 1." in said
        said = await _refused(ann, expected.lines(expected.texts(51)))
        assert "Current: 0 lines of unfinished batch jobs and 51 more asked for, limit: 50." in said
        said = await _refused(ann, [{"custom_id": "a", "body": {"input": "x" * 10_000}}])
        assert "Current: 0 stored bytes and 10,0" in said
        lines = await ann.create(input_url=site.url("/slow"))
        assert "Current: 2 unfinished batch jobs, limit: 2." in await _refused(ann, _LINES)
        assert await _quotas(ann) == {
            "unfinished_jobs": 2, "unfinished_lines": 0, "unfinished_webhooks": 1, "stored_bytes": 0
        }  # fmt: skip
        await bob.wait(await bob.create(_LINES))
        await ann.cancel(lines)
        held = await ann.create(expected.lines(expected.texts(40)))
        await ann.wait(held)
        await ann.cancel(slow)
        assert "stored bytes and " in await _refused(ann, _LINES), "outputs count, too"
        # What is in a file that is fetched is known late.
        cid = await up.of_a_key("small")
        for path, words in (("/lines", None), ("/large", "stored bytes")):
            state = await cid.wait(await cid.create(input_url=site.url(path)), "failed")
            assert (words or "No line could be embedded") in state["error"]


async def test_a_job_ends_when_the_balance_of_its_key_does(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path, auth=True, batch_chunk_tokens=20)) as up:
        keys = KeyTable(up.database)
        poor = await up.of_a_key(balance=100)
        job = await poor.create(expected.lines(expected.texts(300)))
        status = await poor.wait(job, "failed")
        assert status["error"].startswith("The balance of the key is used up.")
        done = status["stats"]["completed"]
        assert 0 < done < 100
        assert len((await poor.download(job)).splitlines()) == done
        spent = await keys.spent((await keys.list())[0].id)
        assert spent == status["stats"]["total_tokens"]
        # As much as the parts that were at work when it was used up.
        assert 100 <= spent < 400


async def test_what_has_ended_holds_no_input(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path, batch_chunk_tokens=20)) as up:
        done, cancelled = [await up.create(expected.lines(expected.texts(n))) for n in (3, 2_000)]
        await up.wait(done)
        await up.cancel(cancelled)

        async def gone() -> bool:
            return not list((tmp_path / "objects").rglob("input*"))

        await until(gone)
        assert len((await up.download(done)).splitlines()) == 3


async def test_a_disk_that_is_nearly_full_takes_no_new_jobs_and_says_so(tmp_path: Path) -> None:
    """As if nothing were left of the disk but the reserve."""
    async with rig(settings(data_dir=tmp_path, disk_reserve_bytes=1 << 60)) as up:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.create(_LINES)
        status, body = told(caught.value)
        assert (status, body["code"]) == (507, "STORAGE_FULL")
        assert body["detail"].startswith("The server's disk is nearly full, so it takes no new batch jobs.")
        ready = orjson.loads((await up.ops.Ready(ops_pb2.ReadyRequest())).data)
        assert (ready["status"], ready["checks"]["engine"]) == ("degraded", "ok")
        assert "nearly full" in ready["checks"]["disk"]

"""What one key takes of what all share: places of webhooks and fetches, jobs, lines, bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson

from tests.batch.rig import rig, until
from tests.media.web import Request, answer, head, web
from tests.rig import settings

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

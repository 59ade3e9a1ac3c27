"""Input by URL that does not come, and the jobs of others."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.batch.rig import rig
from tests.media.web import Request, head, web
from tests.rig import settings


async def test_slow_servers_of_one_key_do_not_hold_the_jobs_of_others(tmp_path: Path) -> None:
    async def silent(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 1_000_000))
        await writer.drain()
        await asyncio.sleep(3600)

    chosen = settings(data_dir=tmp_path, auth=True, fetch_allow_networks=("127.0.0.1/32",))
    async with web(silent) as site, rig(chosen) as up:
        ann, bob = await up.of_a_key(), await up.of_a_key()
        # Twice as many as are read at once for a key.
        slow = [await ann.create(input_url=site.url()) for _ in range(8)]
        await bob.wait(await bob.create([{"custom_id": "a", "body": {"input": "x"}}]))
        assert {(await ann.status(each))["status"] for each in slow} == {"pending"}

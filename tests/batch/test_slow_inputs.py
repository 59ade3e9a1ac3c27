"""Input by URL that does not come, and the jobs of others."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from services.batch import inputs as job_inputs
from services.batch.inputs import JobInputs, Sources
from services.batch.lines import LineReader
from services.batch.schema import new_job_id
from services.batch.table import BatchJob, JobTable
from services.batch.tables import BATCH
from services.core.access.schema import ACCESS
from services.core.catalog import Catalog
from services.core.storage import Database
from services.core.storage.objects import open_store
from tests.batch.rig import rig
from tests.media.web import Request, answer, head, web
from tests.rig import MINILM, settings


async def test_cancelling_a_job_ends_the_fetch_of_its_input(tmp_path: Path) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def trickling(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 1_000_000))
        asked.set()
        try:
            while True:
                writer.write(b"{")
                await writer.drain()
                await asyncio.sleep(0.02)
        except ConnectionError:
            left.set()

    chosen = settings(data_dir=tmp_path, fetch_allow_networks=("127.0.0.1/32",))
    async with web(trickling) as site, rig(chosen) as up:
        job = await up.create(input_url=site.url())
        await asyncio.wait_for(asked.wait(), 100)
        await up.cancel(job)
        await asyncio.wait_for(left.wait(), 100)
        assert (await up.status(job))["status"] == "cancelled"


async def test_an_input_that_takes_too_long_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trickling(_: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, 1_000_000))
        while True:
            writer.write(b"{")
            await writer.drain()
            await asyncio.sleep(0.02)

    monkeypatch.setattr(job_inputs, "FETCH_SECONDS", 0.01)
    chosen = settings(data_dir=tmp_path, fetch_allow_networks=("127.0.0.1/32",), fetch_timeout_seconds=0.5)
    async with web(trickling) as site, rig(chosen) as up:
        status = await up.wait(await up.create(input_url=site.url()), "failed")
        assert status["error"] == f"Cannot fetch '{site.url()}': it took too long."


async def test_who_fetches_an_input_late_leaves_the_planned_one_alone(tmp_path: Path) -> None:
    """Two workers fetch the same input, as when one of them was taken for dead, and find it changed."""
    answers = iter([b'{"custom_id": "a", "body": {"input": "x"}}', b'{"custom_id": "other"}'])

    async def changing(request: Request, writer: asyncio.StreamWriter) -> None:
        await answer(next(answers))(request, writer)

    chosen = settings(data_dir=tmp_path, fetch_allow_networks=("127.0.0.1/32",))
    database = await Database.open(chosen, ACCESS, BATCH)
    table, sources = JobTable(database), Sources(chosen)
    catalog = Catalog.load()
    reader = LineReader(catalog, [catalog.require(MINILM)], max_items=10)
    inputs = JobInputs(chosen, open_store(chosen), sources, reader)
    async with web(changing) as site:
        made = time.time()
        job = BatchJob(
            new_job_id(), "anonymous", MINILM, None, None, True, site.url(), None, made, made + 600, ""
        )
        await table.create(job)
        early, late = await inputs.plan(job), await inputs.plan(job)
        assert await table.plan(job, early.chunks, early.name, early.length)
        assert not await table.plan(job, late.chunks, late.name, late.length)
        await inputs.discard(job, late)
        planned = await table.find(job.id)
        assert planned is not None
        assert [line.custom_id for line in await inputs.lines(planned, early.chunks[0])] == ["a"]
        assert len(list((tmp_path / "objects" / "batches" / job.id).iterdir())) == 1
    await sources.close()
    await database.close()

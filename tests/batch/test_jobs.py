"""The life of jobs in one process: watching, sharing, expiring, charging."""

from __future__ import annotations

import time
from pathlib import Path

import grpc.aio
import orjson
import pytest
from searchfoundation.v1 import batch_pb2, common_pb2
from sqlalchemy import text

from services.batch.schema import input_key, new_job_id
from services.batch.table import BatchJob, JobTable
from services.batch.tables import BATCH
from services.core.access.key_table import KeyTable
from services.core.access.schema import ACCESS
from services.core.storage import Database
from services.core.storage.objects import open_store
from tests.batch import expected
from tests.batch.rig import rig, until
from tests.rig import MINILM, settings


async def test_typed_callers_make_watch_list_and_cancel(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path, batch_chunk_tokens=100)) as up:
        lines = [
            batch_pb2.BatchLine(custom_id=str(n), inputs=[common_pb2.Content(text=one)])
            for n, one in enumerate(expected.texts(80))
        ]
        request = batch_pb2.CreateBatchRequest(model=MINILM, input=batch_pb2.BatchLines(lines=lines))
        made = await up.typed.CreateBatch(request)
        assert made.state == batch_pb2.BATCH_STATE_PENDING
        told_of = [one async for one in up.typed.WatchBatch(batch_pb2.WatchBatchRequest(id=made.id))]
        assert told_of[-1].state == batch_pb2.BATCH_STATE_COMPLETED
        assert [one.succeeded for one in told_of] == sorted(one.succeeded for one in told_of)
        assert len(told_of) > 1
        assert (told_of[-1].succeeded, told_of[-1].total) == (80, 80)
        listed = await up.typed.ListBatches(batch_pb2.ListBatchesRequest())
        assert list(listed.batches) == [told_of[-1]]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.typed.CancelBatch(batch_pb2.CancelBatchRequest(id=made.id))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.typed.CreateBatch(batch_pb2.CreateBatchRequest(model=MINILM))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_typed_line_of_a_picture_is_one_that_fails_in_words(tmp_path: Path) -> None:
    pictures = [common_pb2.Media(data=b"\x89PNG\xff"), common_pb2.Media(url="https://a.example/b.png")]
    part = common_pb2.ContentPart(image=pictures[0])
    contents = [
        common_pb2.Content(text="a fox"),
        *(common_pb2.Content(image=picture) for picture in pictures),
        common_pb2.Content(group=common_pb2.ContentGroup(parts=[part])),
    ]
    lines = [batch_pb2.BatchLine(custom_id=str(n), inputs=[one]) for n, one in enumerate(contents)]
    async with rig(settings(data_dir=tmp_path)) as up:
        request = batch_pb2.CreateBatchRequest(model=MINILM, input=batch_pb2.BatchLines(lines=lines))
        made = await up.typed.CreateBatch(request)
        *_, done = [one async for one in up.typed.WatchBatch(batch_pb2.WatchBatchRequest(id=made.id))]
        assert (done.succeeded, done.failed) == (1, 3)
        asked = batch_pb2.DownloadBatchRequest(id=made.id, file=batch_pb2.BATCH_FILE_ERRORS)
        errors = b"".join([piece.data async for piece in up.typed.DownloadBatch(asked)])
        messages = [orjson.loads(line)["error"]["message"] for line in errors.splitlines()]
        assert all("takes text only" in message for message in messages), messages


async def test_an_expired_job_loses_its_files(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path)) as up:
        job = await up.create([{"custom_id": "a", "body": {"input": "x"}}])
        await up.wait(job)
        folder = tmp_path / "objects" / "batches" / job
        assert folder.exists()
        async with up.database.write() as connection:  # as if its time were over
            await connection.execute(text("UPDATE batch_jobs SET expires_at = :now"), {"now": time.time()})
        status = await up.wait(job, "expired")
        assert status["output_url"] is None
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.download(job)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

        async def gone() -> bool:
            return not folder.exists()

        await until(gone)
        assert (await up.status(job))["status"] == "expired"


async def test_a_small_job_ends_before_a_large_one_of_another_owner(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path, batch_chunk_tokens=1, auth=True)) as up:
        ann, bob = await up.of_a_key(), await up.of_a_key()
        large = await ann.create(expected.lines(expected.texts(200)))

        async def begun() -> bool:
            return (await ann.status(large))["stats"]["completed"] > 0

        await until(begun)
        small = await bob.create(expected.lines(expected.texts(4)))
        assert (await bob.wait(small))["stats"]["completed"] == 4
        assert (await ann.status(large))["stats"]["completed"] < 150
        table = JobTable(up.database)
        jobs = [await table.find(job) for job in (large, small)]
        assert [job.chunks for job in jobs if job is not None] == [200, 4]


async def test_tokens_are_booked_once_and_below_zero_if_need_be(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path)) as up:
        keys = KeyTable(up.database)
        job = await up.create([{"custom_id": "a", "body": {"input": "one two"}}])
        status = await up.wait(job)
        assert await keys.spent("anonymous") == status["stats"]["total_tokens"] == 4


async def test_what_was_lost_between_two_steps_is_handed_out_again(tmp_path: Path) -> None:
    chosen = settings(data_dir=tmp_path)
    made = time.time() - 120
    job = BatchJob(new_job_id(), "anonymous", MINILM, None, None, True, None, None, made, made + 600, "")
    database = await Database.open(chosen, ACCESS, BATCH)
    # As if the process had died before it handed a task out.
    await open_store(chosen).put(input_key(job.id), orjson.dumps({"custom_id": "a", "body": {"input": "x"}}))
    await JobTable(database).create(job)
    await database.close()
    async with rig(chosen) as up:
        assert (await up.wait(job.id))["stats"]["completed"] == 1


async def test_a_thousand_jobs_are_listed_newest_first(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path)) as up:
        now = time.time()
        async with up.database.write() as connection:
            columns = "id, owner, model, normalized, webhook_tries, webhook_ended, state, base_url, joined"
            columns += ", created_at, expires_at, chunks, total, completed, failed, total_tokens"
            for number in range(1_000):
                await connection.execute(
                    text(
                        f"INSERT INTO batch_jobs ({columns}) VALUES (:id, 'anonymous', :model, true, 0, true,"
                        " 'completed', '', false, :made, :ends, 1, 1, 1, 0, 1)"
                    ),
                    {"id": f"batch_{number:032x}", "model": MINILM, "made": now + number, "ends": now + 600},
                )
        listed = (await up.typed.ListBatches(batch_pb2.ListBatchesRequest(limit=1_000))).batches
        assert [one.id for one in listed] == [f"batch_{number:032x}" for number in reversed(range(1_000))]

"""Which models jobs may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from searchfoundation.v1 import batch_pb2

from tests.batch.process import Worker
from tests.batch.rig import rig
from tests.rig import ALIAS, MINILM, settings, told

_LINE = {"custom_id": "a", "body": {"input": "x"}}


async def test_only_the_chosen_ones_take_jobs(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path, batch_models=(ALIAS,))) as up:
        job = await up.create([_LINE], model=ALIAS)
        assert (await up.wait(job))["model"] == ALIAS
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.create([_LINE])
        status, body = told(caught.value)
        assert (status, body["code"]) == (400, "INPUT_MODEL_NOT_FOUND")
        assert body["detail"] == f"Model '{MINILM}' not found. Available models: {ALIAS}."
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.typed.CreateBatch(batch_pb2.CreateBatchRequest(model=MINILM))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == body["detail"]


async def test_a_chosen_model_has_its_aliases_with_it(tmp_path: Path) -> None:
    async with rig(settings(data_dir=tmp_path, batch_models=(MINILM,))) as up:
        for name in (MINILM, ALIAS):
            assert (await up.wait(await up.create([_LINE], model=name)))["model"] == name
        line = {"custom_id": "a", "body": {"model": MINILM, "input": "x"}}
        await up.wait(await up.create([line], model=ALIAS))


async def test_a_line_gets_what_it_asks_for_or_an_error(tmp_path: Path) -> None:
    """The model has one width and always cuts; a call of its own may say so, and so may a line."""
    width = {"dimensions": 384, "truncate": True, "normalized": True}
    async with rig(settings(data_dir=tmp_path)) as up:
        lines = [
            {"custom_id": str(n), "body": {"input": "x", **each}}
            for n, each in enumerate(
                (width, {"dimensions": 64}, {"task": "retrieval.query"}, {"truncate": False})
            )
        ]
        status = await up.wait(await up.create(lines))
        assert (status["stats"]["completed"], status["stats"]["failed"]) == (1, 3)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ('["nobody"]', "'nobody'"),
        (
            '["jina-embeddings-v3"]',
            "SF_BATCH_MODELS names 'jina-embeddings-v3'; models served here that batch jobs can use: "
            f"{MINILM}.",
        ),
        ("[]", "SF_BATCH_MODELS"),
    ],
)
def test_a_choice_that_cannot_be_had_ends_the_start(
    workers: Callable[..., Worker], names: str, sentence: str
) -> None:
    worker = workers(SF_BATCH_MODELS=names)
    worker.process.join(60)
    assert worker.process.exitcode == 2
    assert sentence in worker.text()

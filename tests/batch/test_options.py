"""Tasks, dimensions and lengths of a job's vectors, over a tiny model that has them all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import orjson
import pytest
import pytest_asyncio
import torch
from searchfoundation.v1 import batch_pb2

from services.core.catalog import Catalog
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from tests.batch import expected
from tests.batch.rig import Rig, rig
from tests.decoder_checkpoints import write_served
from tests.rig import settings, told

pytestmark = pytest.mark.asyncio(loop_scope="module")

NANO = "jina-embeddings-v5-text-nano"
SPEC = Catalog.load().require(NANO)
TEXTS = ["hello world", "the quick brown fox", "x"]


@dataclass
class System:
    rig: Rig
    folder: Path

    def encoded(self, task: str) -> Any:
        """Vectors (texts, width) of the network alone."""
        network = load_text_encoder(SPEC, self.folder / NANO, device=torch.device("cpu"), dtype=torch.float32)
        prompted = [SPEC.prompt(task) + text for text in TEXTS]
        items = [
            EncodeItem(each.ids, SPEC.adapter(task)) for each in network.tokenizer.encode_batch(prompted)
        ]
        return np.stack(network.forward(items))

    async def refused(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.rig.create(expected.lines(TEXTS), model=NANO, **fields)
        return told(caught.value)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    folder = tmp_path_factory.mktemp("options")
    write_served(folder, NANO)
    chosen = settings(models=(NANO,), model_dir=folder, data_dir=folder / "data")
    async with rig(chosen) as up:
        yield System(up, folder)


@pytest.mark.parametrize(
    ("asked", "task"),
    [
        (None, "text-matching"),
        ("retrieval", "retrieval.passage"),
        ("retrieval.passage", "retrieval.passage"),
        ("retrieval.query", "retrieval.query"),
        ("clustering", "clustering"),
    ],
)
async def test_vectors_are_made_for_the_task(system: System, asked: str | None, task: str) -> None:
    found = await _vectors(system, {"task": asked})
    wanted = system.encoded(task)
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)


async def test_vectors_are_cut_and_scaled_as_asked(system: System) -> None:
    wanted = system.encoded("text-matching")
    found = await _vectors(system, {"normalized": False})
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    found = await _vectors(system, {"dimensions": 32})
    wanted = wanted[:, :32]
    np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5)


async def _vectors(system: System, fields: dict[str, Any]) -> Any:
    job = await system.rig.create(expected.lines(TEXTS), model=NANO, **fields)
    await system.rig.wait(job)
    lines = [orjson.loads(line) for line in (await system.rig.download(job)).splitlines()]
    return np.array([line["response"]["body"]["data"][0]["embedding"] for line in lines], np.float32)


SAME: list[dict[str, Any]] = [
    {"model": NANO},
    {"model": f"jina-ai/{NANO}"},
    {"task": "retrieval"},
    {"task_type": "retrieval.passage"},
    {"dimensions": 64.0},
    {"output_dimension": 64},
    {"encoding_format": "float", "normalized": True, "truncate": False},
    {"embedding_type": ["float"], "task": None, "dimensions": None, "late_chunking": False},
    {"user": "somebody", "method": "POST"},
    {"input_type": "document"},
    {"task_type": "RETRIEVAL_DOCUMENT"},
]
OTHER: list[tuple[dict[str, Any], str]] = [
    (
        {"model": "all-MiniLM-L6-v2"},
        '\'body.model\' is "all-MiniLM-L6-v2", and "jina-embeddings-v5-text-nano"',
    ),
    ({"model": "text-embedding-3-small"}, "'body.model' is \"text-embedding-3-small\""),
    ({"task": "retrieval.query"}, '\'body.task\' is "retrieval.query", and "retrieval.passage" in this job.'),
    ({"task_type": "clustering"}, "'body.task_type' is \"clustering\""),
    ({"dimensions": 32}, "'body.dimensions' is 32, and 64 in this job."),
    ({"output_dimensionality": 768}, "'body.output_dimensionality' is 768, and 64"),
    ({"encoding_format": "base64"}, '\'body.encoding_format\' is "base64", and "float" in this job.'),
    ({"embedding_type": ["float", "binary"]}, '\'body.embedding_type\' is ["float","binary"], and'),
    ({"normalized": False}, "'body.normalized' is false, and true in this job."),
    ({"truncation": True}, "'body.truncation' is true, and false in this job."),
    ({"input_type": "query"}, "'body.task' is \"retrieval.query\""),
    ({"input_type": "upside-down"}, "'body.input_type' Input should be one of 'query'"),
    ({"output_dtype": "int8"}, "'body.embedding_type' is \"int8\""),
    ({"late_chunking": True}, "'body.late_chunking' is true, and false in this job."),
    ({"dimensions": "many"}, "'body.dimensions' Input should be a valid integer"),
    ({"task": "separation"}, "'body.task' Input should be "),
]


async def test_options_of_a_line_are_those_of_the_job_or_its_error(system: System) -> None:
    bodies = [*SAME, *(fields for fields, _ in OTHER)]
    lines = [{"custom_id": str(n), "body": {"input": "x", **each}} for n, each in enumerate(bodies)]
    job = await system.rig.create(lines, model=NANO, task="retrieval", dimensions=64)
    await system.rig.wait(job)
    output = [orjson.loads(line) for line in (await system.rig.download(job)).splitlines()]
    assert [line["custom_id"] for line in output] == [str(n) for n in range(len(SAME))]
    assert {len(line["response"]["body"]["data"][0]["embedding"]) for line in output} == {64}
    errors = [
        orjson.loads(line)["error"]
        for line in (await system.rig.download(job, batch_pb2.BATCH_FILE_ERRORS)).splitlines()
    ]
    assert [error["line"] for error in errors] == [len(SAME) + n + 1 for n in range(len(OTHER))]
    for error, (_, said) in zip(errors, OTHER, strict=True):
        assert error["message"].startswith(said)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"task": "separation"}, "task"),
        ({"task": "Retrieval"}, "task"),
        ({"task": ""}, "task"),
        ({"task": 7}, "task"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 769}, "dimensions"),
        ({"dimensions": "wide"}, "dimensions"),
        ({"normalized": "no"}, "normalized"),
    ],
)
async def test_options_that_the_model_does_not_have(
    system: System, fields: dict[str, Any], field: str
) -> None:
    status, body = await system.refused(**fields)
    assert (status, body["code"]) == (422, "VALIDATION_ERROR")
    assert body["errors"][0]["field"] == f"body -> {NANO} -> {field}"

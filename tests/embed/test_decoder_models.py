"""The decoder-based encoders through both doors: tasks, widths, long texts, errors; over tiny checkpoints."""

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
from google.api import httpbody_pb2
from google.rpc import error_details_pb2
from searchfoundation.v1 import common_pb2, embed_pb2, embed_pb2_grpc, embed_rest_pb2_grpc

from gateway.openapi import build_openapi
from services.core.catalog import Catalog
from services.core.catalog.types import Capability
from services.core.modeling.registry import load_text_encoder
from services.core.modeling.types import EncodeItem
from services.core.openapi.parts import Bounds
from services.embed.capability import build
from tests.decoder_checkpoints import write_served
from tests.described import Described
from tests.rig import detail, serving, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

NANO, SMALL = "jina-embeddings-v5-text-nano", "jina-embeddings-v5-text-small"
CODE, CODE_LARGE = "jina-code-embeddings-0.5b", "jina-code-embeddings-1.5b"
MODELS = (NANO, SMALL, CODE, CODE_LARGE)
TEXTS = ["def hello(world):", "", "who is it? " * 3]

# What stands before a text, and the adapter, by task; the first is what no task means.
V5 = {
    "text-matching": ("Document: ", "text-matching"),
    "retrieval.query": ("Query: ", "retrieval"),
    "retrieval.passage": ("Document: ", "retrieval"),
    "clustering": ("Document: ", "clustering"),
    "classification": ("Document: ", "classification"),
}
FINDS = {
    "nl2code": (
        "Find the most relevant code snippet given the following query:\n",
        "Candidate code snippet:\n",
    ),
    "qa": ("Find the most relevant answer given the following question:\n", "Candidate answer:\n"),
    "code2code": (
        "Find an equivalent code snippet given the following code snippet:\n",
        "Candidate code snippet:\n",
    ),
    "code2nl": (
        "Find the most relevant comment given the following code snippet:\n",
        "Candidate comment:\n",
    ),
    "code2completion": (
        "Find the most relevant completion given the following start of code snippet:\n",
        "Candidate completion:\n",
    ),
}
PROMPTS = {
    f"{kind}.{side}": (prompt, None)
    for kind, sides in FINDS.items()
    for side, prompt in zip(("query", "passage"), sides, strict=True)
}
SOME = {task: PROMPTS[task] for task in ("nl2code.query", "code2completion.passage")}
TASKS = {NANO: V5, SMALL: V5, CODE: PROMPTS, CODE_LARGE: SOME}

CATALOG = Catalog.load()
DESCRIBED = Described(
    build_openapi({Capability.EMBED: CATALOG.select(MODELS)}, Bounds(items=400)), "/v1/embeddings"
)


@dataclass
class Rig:
    folder: Path
    typed: embed_pb2_grpc.EmbedServiceAsyncStub
    rest: embed_rest_pb2_grpc.EmbedRestServiceAsyncStub

    async def post(self, model: str, input: Any, **fields: Any) -> dict[str, Any]:
        body = orjson.dumps({"model": model, "input": input, **fields})
        DESCRIBED.request.validate(orjson.loads(body))
        answer = orjson.loads((await self.rest.CreateEmbeddings(httpbody_pb2.HttpBody(data=body))).data)
        DESCRIBED.component("EmbeddingResponse").validate(answer)
        return answer

    async def embed(self, model: str, *texts: str, **options: Any) -> embed_pb2.EmbedResponse:
        inputs = [common_pb2.Content(text=text) for text in texts]
        return await self.typed.Embed(
            embed_pb2.EmbedRequest(model=model, inputs=inputs, options=embed_pb2.EmbedOptions(**options))
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """All four behind one server, with memory for about two of them at a time."""
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        write_served(folder, model)
    lazy = {"model_residency": "lazy", "device_memory_bytes": 32 << 20}
    async with serving(build, settings(models=MODELS, model_dir=folder, **lazy)) as up:
        yield Rig(
            folder,
            embed_pb2_grpc.EmbedServiceStub(up.channel),  # type: ignore[arg-type]
            embed_rest_pb2_grpc.EmbedRestServiceStub(up.channel),  # type: ignore[arg-type]
        )


def typed_task(task: str) -> int:
    return common_pb2.Task.Value("TASK_" + task.upper().replace(".", "_").replace("-", "_"))


def rest_vectors(answer: dict[str, Any]) -> np.ndarray:
    return np.array([item["embedding"] for item in answer["data"]])


def typed_vectors(answer: embed_pb2.EmbedResponse) -> np.ndarray:
    return np.array([each.dense.values for each in answer.embeddings])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("model", MODELS)
async def test_each_task_reads_with_its_prompt_and_adapter(rig: Rig, model: str) -> None:
    spec = CATALOG.require(model)
    alone = load_text_encoder(spec, rig.folder / model, device=torch.device("cpu"), dtype=torch.float32)
    assert set(spec.tasks) == set(V5 if model in (NANO, SMALL) else PROMPTS)
    for place, (task, (prompt, adapter)) in enumerate(TASKS[model].items()):
        tokens = alone.tokenizer.encode_batch([prompt + text for text in TEXTS])
        wanted = unit(np.stack([alone.forward([EncodeItem(each.ids, adapter)])[0] for each in tokens]))  # type: ignore[arg-type]
        answer = await rig.post(model, TEXTS, task=task)
        np.testing.assert_allclose(rest_vectors(answer), wanted, atol=1e-5)
        count = sum(len(each.ids) for each in tokens)
        assert answer["usage"] == {"total_tokens": count, "prompt_tokens": count}
        typed = await rig.embed(model, *TEXTS, task=typed_task(task))
        np.testing.assert_allclose(typed_vectors(typed), wanted, atol=1e-5)
        assert typed.usage.total_tokens == count
        if place == 0:
            np.testing.assert_allclose(rest_vectors(await rig.post(model, TEXTS)), wanted, atol=1e-5)
            np.testing.assert_allclose(typed_vectors(await rig.embed(model, *TEXTS)), wanted, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
async def test_vectors_may_be_short_and_of_any_length(rig: Rig, model: str) -> None:
    spec = CATALOG.require(model)
    width = spec.dimensions
    whole = typed_vectors(await rig.embed(model, *TEXTS, normalized=False))
    assert whole.shape == (3, width)
    for dimensions in (1, 64, 100, width):
        short = typed_vectors(await rig.embed(model, *TEXTS, dimensions=dimensions))
        np.testing.assert_allclose(short, unit(whole[:, :dimensions]), atol=1e-5)
        raw = rest_vectors(await rig.post(model, TEXTS, dimensions=dimensions, normalized=False))
        # The contract gives the code models no choice: theirs have length 1 whatever is asked.
        wanted = whole[:, :dimensions] if spec.normalize_choice else short
        np.testing.assert_allclose(raw, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "options", "field"),
    [
        (NANO, {"dimensions": 769}, "options.dimensions"),
        (CODE, {"dimensions": 897}, "options.dimensions"),
        (NANO, {"task": common_pb2.TASK_SEPARATION}, "options.task"),
        (NANO, {"task": common_pb2.TASK_QA_QUERY}, "options.task"),
        (CODE, {"task": common_pb2.TASK_CLUSTERING}, "options.task"),
    ],
)
async def test_a_typed_caller_is_told_what_the_model_has_not(
    rig: Rig, model: str, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.embed(model, "hello", **options)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail(caught.value, error_details_pb2.BadRequest).field_violations
    assert violation.field == field


async def test_a_text_over_the_context_is_refused_or_cut(rig: Rig) -> None:
    long = "x" * 9000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.embed(NANO, long)
    assert detail(caught.value, error_details_pb2.ErrorInfo).reason == "INPUT_TOKEN_LIMIT_EXCEEDED"
    cut = await rig.embed(NANO, long, truncate=True)
    assert cut.usage.total_tokens == 8192


async def test_one_stream_may_change_tasks_and_models(rig: Rig) -> None:
    asked = [(model, task) for model in (NANO, CODE) for task in list(TASKS[model])[:2]]

    async def messages() -> AsyncIterator[embed_pb2.EmbedStreamRequest]:
        for model, task in asked:
            options = embed_pb2.EmbedOptions(task=typed_task(task))  # type: ignore[arg-type]
            content = common_pb2.Content(text=TEXTS[0])
            yield embed_pb2.EmbedStreamRequest(model=model, input=content, options=options)

    answers = [answer async for answer in rig.typed.EmbedStream(messages())]
    for (model, task), answer in zip(asked, answers, strict=True):
        assert answer.result.model == model
        (wanted,) = typed_vectors(await rig.embed(model, TEXTS[0], task=typed_task(task)))
        np.testing.assert_allclose(answer.result.embeddings[0].dense.values, wanted, atol=1e-5)

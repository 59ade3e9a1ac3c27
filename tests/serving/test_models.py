"""ModelService, and the words of the catalogue in the contract's enums."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest
import pytest_asyncio
from searchfoundation.v1 import common_pb2, model_pb2, model_pb2_grpc

from services.core.access import AccessControl
from services.core.catalog import Catalog
from services.core.catalog.types import Modality, ModelSpec, OutputKind
from services.core.serving import Server
from services.core.serving.models import ModelsCapability, model_message
from services.core.serving.vocabulary import MODALITIES, OUTPUTS, TASKS, task_name
from services.core.settings import Settings

CATALOG = Catalog.load()
SERVED = CATALOG.select(["all-MiniLM-L6-v2", "jina-embeddings-v3", "jina-colbert-v2"])


class Shelf:
    """Stands in for an engine: the service asks it for nothing but the list."""

    on_failure = None
    healthy = True
    served: tuple[ModelSpec, ...] = SERVED


@pytest_asyncio.fixture
async def models() -> AsyncIterator[model_pb2_grpc.ModelServiceAsyncStub]:
    settings = Settings(auth=False, grpc_port=0, drain_seconds=0, access_log=False)
    access = await AccessControl.open(settings)
    server = Server(settings, [ModelsCapability(CATALOG, SERVED)], Shelf(), access)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[misc]
    await server.stop(drain=False)
    await access.close()


def test_every_word_has_its_number() -> None:
    assert set(TASKS) == {task for spec in CATALOG.models.values() for task in spec.tasks}
    assert set(MODALITIES) == set(Modality)
    assert set(OUTPUTS) == set(OutputKind)
    for words, enum, prefix in (
        (TASKS, common_pb2.Task, "TASK_"),
        (MODALITIES, common_pb2.Modality, "MODALITY_"),
        (OUTPUTS, common_pb2.OutputKind, "OUTPUT_KIND_"),
    ):
        assert set(words.values()) | {0} == set(enum.values())
        for word, number in words.items():
            assert enum.Name(number) == prefix + word.replace(".", "_").replace("-", "_").upper()
    assert [task_name(number) for number in TASKS.values()] == list(TASKS)
    assert task_name(99) == "99"


def test_every_model_of_the_catalogue_can_be_told() -> None:
    for spec in CATALOG.models.values():
        assert model_message(spec).id == spec.id


async def test_list(models: model_pb2_grpc.ModelServiceAsyncStub) -> None:
    answer = await models.ListModels(model_pb2.ListModelsRequest())
    assert [model.id for model in answer.models] == [spec.id for spec in SERVED]
    minilm, v3, colbert = answer.models
    assert (minilm.context_length, minilm.dimensions, minilm.variable_dimensions) == (512, 384, True)
    assert list(minilm.modalities) == [common_pb2.MODALITY_TEXT]
    assert minilm.default_task == common_pb2.TASK_UNSPECIFIED
    assert common_pb2.TASK_SEPARATION in v3.tasks
    assert v3.late_chunking
    assert list(colbert.dimension_choices) == [64, 96, 128]
    assert list(colbert.outputs) == [common_pb2.OUTPUT_KIND_MULTI_VECTOR]
    assert v3.created.ToDatetime().date() == SERVED[1].released


@pytest.mark.parametrize("prefix", ["", "jina-ai/", "jinaai/"])
async def test_get(models: model_pb2_grpc.ModelServiceAsyncStub, prefix: str) -> None:
    answer = await models.GetModel(model_pb2.GetModelRequest(id=f"{prefix}jina-embeddings-v3"))
    assert answer.model.id == "jina-embeddings-v3"


async def test_get_by_the_name_of_a_repository(models: model_pb2_grpc.ModelServiceAsyncStub) -> None:
    answer = await models.GetModel(model_pb2.GetModelRequest(id="sentence-transformers/all-MiniLM-L6-v2"))
    assert answer.model.id == "all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ["", "jina-embeddings-v4", "no-such-model"])
async def test_get_what_is_not_served(models: model_pb2_grpc.ModelServiceAsyncStub, name: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await models.GetModel(model_pb2.GetModelRequest(id=name))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND

"""``ModelService``: which models this process serves, for gRPC callers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc.aio
from searchfoundation.v1 import common_pb2, model_pb2, model_pb2_grpc

from services.core.catalog import Catalog
from services.core.catalog.types import ModelSpec
from services.core.errors import ErrorCode, ServiceError
from services.core.serving.vocabulary import MODALITIES, OUTPUTS, TASKS

Context = grpc.aio.ServicerContext[Any, Any]


class ModelsCapability(model_pb2_grpc.ModelServiceServicer):
    """Serves the list beside whatever other capabilities a process has."""

    name = "models"
    service_names = (model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,)

    def __init__(self, catalog: Catalog, served: Iterable[ModelSpec]) -> None:
        self._catalog = catalog
        self._models = {spec.id: model_message(spec) for spec in served}

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, server)

    max_body_bytes = 1 << 16

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to let go of."""

    async def ListModels(  # noqa: N802 - named by the contract
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """List all models."""
        return model_pb2.ListModelsResponse(models=self._models.values())

    async def GetModel(  # noqa: N802 - named by the contract
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """Describe one model."""
        spec = self._catalog.get(request.id)
        model = self._models.get(spec.id) if spec is not None else None
        if model is None:
            raise ServiceError(
                ErrorCode.RESOURCE_NOT_FOUND, resource_type="Model", resource_id=request.id[:100]
            )
        return model_pb2.GetModelResponse(model=model)


def model_message(spec: ModelSpec) -> model_pb2.Model:
    """Render an entry of the catalogue."""
    model = model_pb2.Model(
        id=spec.id,
        name=spec.name,
        description=spec.description,
        repository=spec.repository,
        revision=spec.revision,
        licence=spec.licence,
        modalities=[MODALITIES[modality] for modality in spec.modalities],
        outputs=[OUTPUTS[kind] for kind in spec.outputs],
        context_length=spec.context_length,
        dimensions=spec.dimensions,
        variable_dimensions=spec.matryoshka,
        dimension_choices=spec.dimension_choices,
        tasks=[TASKS[task] for task in spec.tasks],
        default_task=TASKS[spec.default_task] if spec.default_task else common_pb2.TASK_UNSPECIFIED,
        late_chunking=spec.late_chunking,
    )
    model.created.FromSeconds(spec.created)
    return model

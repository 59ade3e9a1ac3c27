"""From a method's path to its handler."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from searchfoundation.v1 import ops_pb2_grpc

from services.core.errors import ErrorCode, ServiceError
from services.core.serving.capability import ServingCapability
from services.core.serving.exchange import Context, Exchange, Route, arrived_with, begin
from services.core.serving.health import HealthServices
from services.core.serving.metrics import CALLS
from services.core.serving.pipeline import Handler, Pipeline
from services.core.serving.ready import ReadyServicer

_REFLECTION_V1 = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
_REFLECTION_V1ALPHA = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_UNKNOWN = Route("", "unknown", streaming=False, rest=False, parse=None, render=None)


class Dispatcher(grpc.GenericRpcHandler):
    """The only handler the gRPC server asks: one dictionary look-up per call.

    Health, readiness and reflection are public; everything a capability registers goes through the pipeline;
    a path nobody knows ends as UNIMPLEMENTED in the documented form.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._handlers: dict[str, Handler] = {}
        self._unknown: Handler = grpc.stream_unary_rpc_method_handler(self._refuse)
        self._closing = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Find the handler of a call, in whose context it then runs."""
        arrived_with.set(handler_call_details.invocation_metadata)
        return self._handlers.get(handler_call_details.method, self._unknown)

    def add_capability(self, capability: ServingCapability) -> None:
        """Take the handlers of a capability in, each within the pipeline."""
        for path, handler in _registered(capability.add_to_server).items():
            self._handlers[path] = self._pipeline.wrap(
                capability.name, path, handler, capability.max_body_bytes
            )

    def add_public(
        self, health: HealthServices, ready: ReadyServicer, service_names: Sequence[str], *, reflect: bool
    ) -> None:
        """Serve health, readiness and, if wanted, reflection, without a key and outside the pipeline."""

        def register(server: grpc.aio.Server) -> None:
            health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
            ops_pb2_grpc.add_OpsServiceServicer_to_server(ready, server)
            if reflect:
                reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
                    reflection.aio.ReflectionServicer((*service_names, reflection.SERVICE_NAME)), server
                )

        for path, handler in _registered(register).items():
            self._handlers[path] = self._until_closing(handler)
        if reflect:
            # Both versions of reflection are the same bytes on the wire; new tools ask for v1 first.
            self._handlers[_REFLECTION_V1] = self._handlers[_REFLECTION_V1ALPHA]

    def close_public_streams(self) -> None:
        """End health watches and reflection streams, which would hold up a stopping server for ever."""
        self._closing.set()

    async def _refuse(self, _requests: Any, context: Context) -> None:
        exchange: Exchange = begin(_UNKNOWN, context, arrived_with.get(), self._pipeline.bodies)
        CALLS.record(
            exchange.call,
            0.0,
            capability="",
            method=_UNKNOWN.path,
            model="",
            code=ErrorCode.ROUTE_NOT_FOUND.value,
        )
        await exchange.fail(ServiceError(ErrorCode.ROUTE_NOT_FOUND))

    def _until_closing(self, handler: Handler) -> Handler:
        if handler.unary_stream is not None:
            watch: Any = handler.unary_stream

            async def watching(request: Any, context: Context) -> None:
                await self._race(watch(request, context), context)

            return grpc.unary_stream_rpc_method_handler(
                watching, handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None:
            reflect: Any = handler.stream_stream

            async def reflecting(requests: Any, context: Context) -> None:
                async def relay() -> None:
                    async for response in reflect(requests, context):
                        await context.write(response)

                await self._race(relay(), context)

            return grpc.stream_stream_rpc_method_handler(
                reflecting, handler.request_deserializer, handler.response_serializer
            )
        return handler

    async def _race(self, work: Any, context: Context) -> None:
        working = asyncio.ensure_future(work)
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((working, closing), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
                return
        finally:
            working.cancel()
            closing.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "The server is shutting down.")


class _Registry:
    """Stands in for the server towards the generated registering functions."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Handler]
    ) -> None:
        """Keep handlers by full path."""
        for name, handler in method_handlers.items():
            self.handlers[f"/{service_name}/{name}"] = handler

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        """Ignore the second, opaque form in which generated code registers the same handlers.

        grpc.aio waits on one future per pre-registered method for every call, so the server itself is only
        given the dispatcher.
        """


def _registered(register: Any) -> dict[str, Handler]:
    registry = _Registry()
    register(cast("grpc.aio.Server", registry))
    return registry.handlers

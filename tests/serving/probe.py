"""A capability with one method of each kind, whose work a test decides, and what it takes to serve it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2

from services.core.access import AccessControl
from services.core.call import Call, current_call
from services.core.serving import Server, rest
from services.core.settings import Settings

MODEL = "probe-model"

Act = Callable[[Call, Any], Awaitable[Any]]


async def echo(call: Call, request: Any) -> Any:
    """Answer the request, as a capability does that charges one token."""
    call.model = MODEL
    await call.charge(1)
    call.usage_tokens = 1
    return request


@dataclass
class Probe:
    """``act`` does the work of every message of every method."""

    act: Act = echo
    name: str = "probe"
    service_names: Sequence[str] = ("probe.Probe", "probe.ProbeRestService")
    calls: list[Call] = field(default_factory=list)
    warm: asyncio.Event | None = None
    max_body_bytes: int = 0
    stopped: bool = False

    async def start(self) -> None:
        if self.warm is not None:
            await self.warm.wait()

    async def stop(self) -> None:
        self.stopped = True

    def add_to_server(self, server: grpc.aio.Server) -> None:
        text = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        body = {
            "request_deserializer": HttpBody.FromString,
            "response_serializer": HttpBody.SerializeToString,
        }
        server.add_registered_method_handlers(
            "probe.Probe",
            {
                "Unary": grpc.unary_unary_rpc_method_handler(self._unary, **text),
                "Down": grpc.unary_stream_rpc_method_handler(self._down, **text),
                "Up": grpc.stream_unary_rpc_method_handler(self._up, **text),
                "Both": grpc.stream_stream_rpc_method_handler(self._both, **text),
            },
        )
        server.add_registered_method_handlers(
            "probe.ProbeRestService",
            {
                "Do": grpc.unary_unary_rpc_method_handler(self._rest, **body),
                "Events": grpc.unary_stream_rpc_method_handler(self._events, **body),
            },
        )

    async def _work(self, request: Any) -> Any:
        call = current_call.get()
        self.calls.append(call)
        return await self.act(call, request)

    async def _unary(self, request: StringValue, _context: Any) -> StringValue:
        return await self._work(request)

    async def _down(self, request: StringValue, _context: Any) -> AsyncIterator[StringValue]:
        for letter in request.value:
            yield await self._work(StringValue(value=letter))

    async def _up(self, requests: AsyncIterator[StringValue], _context: Any) -> StringValue:
        texts = [(await self._work(request)).value async for request in requests]
        return StringValue(value="".join(texts))

    async def _both(self, requests: AsyncIterator[StringValue], _context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield await self._work(request)

    async def _rest(self, request: rest.Body, _context: Any) -> HttpBody:
        return rest.encode(await self._work(await rest.decode(request)))

    async def _events(self, request: rest.Body, _context: Any) -> AsyncIterator[HttpBody]:
        for event in (await rest.decode(request))["events"]:
            yield rest.encode(await self._work(event))


@dataclass(frozen=True)
class ProbeModel:
    id: str = MODEL


@dataclass
class ProbeEngine:
    """Stands for the engine where a test makes it fail."""

    served: Sequence[ProbeModel] = (ProbeModel(),)
    healthy: bool = True
    on_failure: Callable[[], None] | None = None

    def fail(self) -> None:
        """Do what the engine does when a worker dies."""
        self.healthy = False
        assert self.on_failure is not None
        self.on_failure()


@dataclass
class Running:
    """A server and a channel to it."""

    server: Server
    probe: Probe
    engine: ProbeEngine
    channel: grpc.aio.Channel
    stopped: bool = False

    async def stop(self, *, drain: bool = True) -> None:
        """Stop the server now, not at the end of the test."""
        self.stopped = True
        await self.server.stop(drain=drain)

    def unary(self, value: str = "hi", **call: Any) -> grpc.aio.UnaryUnaryCall[StringValue, StringValue]:
        method = self.channel.unary_unary(
            "/probe.Probe/Unary",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )
        return method(StringValue(value=value), **call)

    def rest(self, data: bytes = b"{}", **call: Any) -> grpc.aio.UnaryUnaryCall[HttpBody, HttpBody]:
        method = self.channel.unary_unary(
            "/probe.ProbeRestService/Do",
            request_serializer=HttpBody.SerializeToString,
            response_deserializer=HttpBody.FromString,
        )
        return method(HttpBody(content_type="application/json", data=data), **call)

    def streaming(self, kind: str) -> Any:
        """The multi-callable of ``Down``, ``Up`` or ``Both``."""
        make = {
            "Down": self.channel.unary_stream,
            "Up": self.channel.stream_unary,
            "Both": self.channel.stream_stream,
        }[kind]
        return make(
            f"/probe.Probe/{kind}",
            request_serializer=StringValue.SerializeToString,
            response_deserializer=StringValue.FromString,
        )


def settings(**changes: Any) -> Settings:
    return Settings(
        **{"grpc_port": 0, "drain_seconds": 0, "access_log": False, "auth": False, "grace_seconds": 5}
        | changes
    )


@asynccontextmanager
async def running(act: Act = echo, *, probe: Probe | None = None, **changes: Any) -> AsyncIterator[Running]:
    """Serve a probe with the given settings; stopped at the end unless the test has stopped it."""
    chosen = settings(**changes)
    probe = probe or Probe(act)
    probe.max_body_bytes = probe.max_body_bytes or chosen.max_body_bytes
    engine = ProbeEngine()
    access = await AccessControl.open(chosen)
    server = Server(chosen, [probe], engine, access)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        house = Running(server, probe, engine, channel)
        try:
            yield house
        finally:
            if not house.stopped:
                await server.stop(drain=False)
            await access.close()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """Await a call that has to fail, and return how it did."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"the call was answered: {answer!r}")


def trailers(error: grpc.aio.AioRpcError) -> dict[str, str | bytes]:
    return dict(error.trailing_metadata() or ())  # type: ignore[arg-type]


def reason(error: grpc.aio.AioRpcError) -> str:
    """The error code of a failure, as its ErrorInfo says."""
    status = status_pb2.Status.FromString(trailers(error)["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason

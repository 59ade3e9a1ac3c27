"""Health, reflection, draining and stopping."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from searchfoundation.v1 import ops_pb2, ops_pb2_grpc

from services.core.access import AccessControl
from services.core.access.control import Check
from services.core.call import Call
from services.core.serving import PortInUseError, Server, StopReason
from services.core.serving.ready import ReadyServicer
from tests.servers import free_port
from tests.serving.probe import Probe, ProbeEngine, Running, failure, reason, running, settings, trailers

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", "probe.Probe", "probe.ProbeRestService")


async def check(channel: grpc.aio.Channel, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


class Gate:
    """Work that says when it has begun and ends when it is let go."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.leave = asyncio.Event()

    async def __call__(self, _call: Call, request: Any) -> Any:
        self.entered.release()
        await self.leave.wait()
        return request


async def test_health_serves_every_name_and_no_other() -> None:
    async with running() as house:
        for name in NAMES:
            assert await check(house.channel, name) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await check(house.channel, "probe.Other")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_says_serving_only_once_the_capabilities_are_ready() -> None:
    chosen = settings(grpc_port=free_port())
    probe = Probe(warm=asyncio.Event())
    access = await AccessControl.open(chosen)
    server = Server(chosen, [probe], ProbeEngine(), access)
    starting = asyncio.ensure_future(server.start())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{chosen.grpc_port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 100)
        assert [await check(channel, name) for name in NAMES] == [NOT_SERVING] * 3
        assert not server.ready
        assert probe.warm is not None
        probe.warm.set()
        await starting
        assert [await check(channel, name) for name in NAMES] == [SERVING] * 3
        assert server.ready
    await server.stop(drain=False)
    await access.close()
    assert probe.stopped


async def test_an_engine_that_fails_takes_health_down_and_asks_for_the_end() -> None:
    async with running() as house:
        stub = health_pb2_grpc.HealthStub(house.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="probe.Probe"))
        assert (await watch.read()).status == SERVING
        await asyncio.to_thread(house.engine.fail)
        assert await asyncio.wait_for(house.server.wait(), 100) is StopReason.ENGINE_FAILED
        stopping = asyncio.ensure_future(house.stop(drain=False))
        assert (await watch.read()).status == NOT_SERVING
        await stopping


async def test_an_engine_that_is_dead_at_the_start_never_serves() -> None:
    chosen = settings()
    access = await AccessControl.open(chosen)
    server = Server(chosen, [Probe()], ProbeEngine(healthy=False), access)
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        assert await check(channel, "") == NOT_SERVING
        assert await server.wait() is StopReason.ENGINE_FAILED
        await server.stop(drain=False)
    await access.close()


async def test_readiness_lists_its_checks() -> None:
    async with running(auth=False) as house:
        stub = ops_pb2_grpc.OpsServiceStub(house.channel)
        answer = await stub.Ready(ops_pb2.ReadyRequest())
        assert answer.data == b'{"status":"ok","checks":{"engine":"ok"}}'
        house.engine.healthy = False
        answer = await stub.Ready(ops_pb2.ReadyRequest())
        assert answer.data == b'{"status":"unavailable","checks":{"engine":"unavailable"}}'


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_lists_the_services(version: str) -> None:
    async with running() as house:
        method = house.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )

        async def ask() -> Any:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        answer = await method(ask()).read()
        names = {service.name for service in answer.list_services_response.service}
    assert names >= {"probe.Probe", "probe.ProbeRestService"}


async def test_draining_takes_health_down_first_and_still_takes_calls() -> None:
    async with running(drain_seconds=0.3) as house:
        watch = health_pb2_grpc.HealthStub(house.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stopping = asyncio.ensure_future(house.stop())
        assert (await watch.read()).status == NOT_SERVING
        assert [await check(house.channel, name) for name in NAMES] == [NOT_SERVING] * 3
        assert (await house.unary("still")).value == "still"
        assert not stopping.done()
        await stopping
        assert (await failure(house.unary())).code() is grpc.StatusCode.UNAVAILABLE


async def test_no_accepted_call_fails_while_the_server_stops_under_load() -> None:
    gate = Gate()
    async with running(gate) as house:
        inside = [asyncio.ensure_future(house.unary(str(number))) for number in range(50)]
        rest = [asyncio.ensure_future(house.rest(b'{"x": 1}')) for _ in range(50)]
        stream = house.streaming("Both")()
        await stream.write(StringValue(value="s"))
        for _ in range(101):
            await gate.entered.acquire()
        stopping = asyncio.ensure_future(house.stop())
        refused = await failure(_until_refused(house))
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(refused) == "SERVICE_UNAVAILABLE"
        assert "retry-after" in trailers(refused)
        assert not stopping.done()
        gate.leave.set()
        assert [(await call).value for call in inside] == [str(number) for number in range(50)]
        assert all([(await call).data == b'{"x":1}' for call in rest])
        assert (await stream.read()).value == "s"
        await stream.done_writing()
        await stopping


async def _until_refused(house: Running) -> None:
    """Make calls that time out as long as the server takes them in."""
    while True:
        try:
            await house.unary(timeout=0.05)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise


async def test_callers_who_heed_no_health_are_told_unavailable_before_the_end() -> None:
    async with running() as house:
        stopping = asyncio.ensure_future(house.stop())
        refused = await failure(_until_refused(house))
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(refused) == "SERVICE_UNAVAILABLE"
        await stopping


async def test_calls_that_outlast_the_grace_are_cancelled() -> None:
    gate = Gate()
    async with running(gate, grace_seconds=0.2) as house:
        call = asyncio.ensure_future(house.unary())
        await gate.entered.acquire()
        await asyncio.wait_for(house.stop(), 100)
        error = await failure(call)
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


async def test_watchers_of_health_do_not_hold_up_the_end() -> None:
    async with running(grace_seconds=200) as house:
        stub = health_pb2_grpc.HealthStub(house.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""))
        assert (await watch.read()).status == SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(house.channel).ServerReflectionInfo()
        await reflect.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await reflect.read()
        await asyncio.wait_for(house.stop(), 100)
        assert (await watch.read()).status == NOT_SERVING
        assert (await failure(watch.read())).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_taken_port_is_told_in_a_sentence() -> None:
    async with running() as house:
        chosen = settings(grpc_port=house.server.port)
        access = await AccessControl.open(chosen)
        second = Server(chosen, [Probe()], ProbeEngine(), access)
        with pytest.raises(PortInUseError, match=f"Cannot listen on 127.0.0.1:{house.server.port}"):
            await second.start()
        await access.close()


async def test_the_first_reason_to_stop_counts() -> None:
    async with running() as house:
        house.server.request_stop(StopReason.TERMINATED)
        house.server.request_stop(StopReason.ENGINE_FAILED)
        assert await house.server.wait() is StopReason.TERMINATED


async def test_reflection_can_be_switched_off() -> None:
    async with running(reflection=False) as house:
        for version in ("v1", "v1alpha"):
            path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
            error = await failure(house.channel.stream_unary(path)(iter([b""])))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@dataclass
class Pings:
    """Access of which only the looks at what it stands on are real."""

    down: set[str]
    asked: int = 0

    async def ping(self) -> dict[str, Check]:
        self.asked += 1
        return {name: Check(ok=name not in self.down, detail="away") for name in ("database", "redis")}


@pytest.mark.parametrize(
    ("down", "status"),
    [
        (set(), "ok"),
        ({"redis"}, "degraded"),
        ({"database"}, "unavailable"),
        ({"database", "redis"}, "unavailable"),
    ],
)
async def test_readiness_tells_what_calls_can_do_without(down: set[str], status: str) -> None:
    pings = Pings(down)
    servicer = ReadyServicer(lambda: True, pings)  # type: ignore[arg-type]
    for _ in range(50):
        answer = orjson.loads((await servicer.Ready(ops_pb2.ReadyRequest(), None)).data)  # type: ignore[arg-type]
        assert answer["status"] == status
        assert answer["checks"]["redis"] == ("unavailable: away" if "redis" in down else "ok")
    assert pings.asked < 50, "an answer is given again for a moment"

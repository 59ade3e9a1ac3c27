"""Metrics, logs and the pages for scrapers and probes."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.core.call import Call, current_call
from services.core.errors import ErrorCode, ServiceError
from services.core.serving import logs
from services.core.serving.aggregate import merge
from services.core.serving.exposition import Exposition
from services.core.serving.logs import JsonFormatter, TextFormatter, timestamp
from services.core.serving.ports import PortInUseError
from tests.serving.probe import MODEL, echo, failure, running

UNARY = {"capability": "probe", "method": "/probe.Probe/Unary"}


def value(name: str, **labels: str) -> float:
    """A sample of this process's metrics page; 0 where there is none yet."""
    for family in text_string_to_metric_families(generate_latest().decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return 0.0


class Change:
    """How a sample has changed since."""

    def __init__(self, name: str, **labels: str) -> None:
        self._sample = (name, labels)
        self._before = value(name, **labels)

    def __call__(self) -> float:
        name, labels = self._sample
        return value(name, **labels) - self._before


async def test_calls_are_counted_by_capability_method_model_and_code() -> None:
    answered = Change("searchfoundation_requests_total", **UNARY, model=MODEL, code="OK")
    refused = Change("searchfoundation_requests_total", **UNARY, model="", code="INPUT_INVALID")
    tokens = Change("searchfoundation_tokens_total", **UNARY, model=MODEL)

    async def act(call: Call, request: Any) -> Any:
        if request.value == "no":
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="No.")
        return await echo(call, request)

    async with running(act) as house:
        await house.unary()
        await house.unary()
        await failure(house.unary("no"))
    assert (answered(), refused(), tokens()) == (2, 1, 2)


async def test_durations_and_stages_are_histograms() -> None:
    labels = UNARY | {"model": MODEL}
    count = Change("searchfoundation_request_duration_seconds_count", **labels)
    queued = Change("searchfoundation_request_stage_seconds_sum", **labels, stage="queue")
    up_to_1 = Change("searchfoundation_request_stage_seconds_bucket", **labels, stage="queue", le="1.0")
    up_to_5 = Change("searchfoundation_request_stage_seconds_bucket", **labels, stage="queue", le="5.0")
    endless = Change("searchfoundation_request_stage_seconds_bucket", **labels, stage="queue", le="+Inf")

    async def act(call: Call, request: Any) -> Any:
        call.timings.queue = float(request.value)
        return await echo(call, request)

    async with running(act) as house:
        for seconds in ("0.5", "2", "1000"):
            await house.unary(seconds)
    assert count() == 3
    assert queued() == pytest.approx(1002.5)
    assert (up_to_1(), up_to_5(), endless()) == (1, 2, 3)


async def test_cancelled_and_expired_calls_have_codes_of_their_own() -> None:
    cancelled = Change("searchfoundation_requests_total", **UNARY, code="CANCELLED")
    expired = Change("searchfoundation_requests_total", **UNARY, code="SERVICE_TIMEOUT")
    entered = asyncio.Semaphore(0)

    async def act(_call: Call, _request: Any) -> Any:
        entered.release()
        await asyncio.Event().wait()

    async with running(act, request_timeout_seconds=0.1) as house:
        call = house.unary()
        await entered.acquire()
        call.cancel()
        await failure(house.unary())
        await house.stop()
    assert (cancelled(), expired()) == (1, 1)


async def test_what_callers_send_makes_no_labels() -> None:
    async def act(call: Call, request: Any) -> Any:
        call.model = request.value
        return request

    unknown = Change("searchfoundation_requests_total", method="unknown", code="ROUTE_NOT_FOUND")
    async with running(act) as house:
        await house.unary("made-up-model")
        await failure(house.channel.unary_unary("/made.Up/Method")(b""))
    page = generate_latest().decode()
    assert "made-up-model" not in page
    assert "made.Up" not in page
    assert unknown() == 1


async def test_calls_in_flight_are_a_gauge() -> None:
    entered, leave = asyncio.Semaphore(0), asyncio.Event()

    async def act(_call: Call, request: Any) -> Any:
        entered.release()
        await leave.wait()
        return request

    in_flight = Change("searchfoundation_requests_in_flight")
    async with running(act) as house:
        calls = [asyncio.ensure_future(house.unary()) for _ in range(3)]
        for _ in calls:
            await entered.acquire()
        assert in_flight() == 3
        leave.set()
        await asyncio.gather(*calls)
        assert in_flight() == 0


async def test_each_call_is_a_line_of_json(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(access_log=True) as house:
        await house.unary(metadata=(("x-request-id", "r1"),))
        await house.stop()
    (line,) = [json.loads(text) for text in capfd.readouterr().err.splitlines() if '"access"' in text]
    assert line["request_id"] == "r1"
    assert line["method"] == "/probe.Probe/Unary"
    assert (line["code"], line["key_id"], line["model"], line["tokens"]) == ("OK", "anonymous", MODEL, 1)
    assert {"time", "seconds", "tokenize", "queue", "inference"} <= line.keys()


async def test_in_text_each_call_is_a_short_line(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(access_log=True, log_format="text") as house:
        await house.unary()
        await house.stop()
    assert re.fullmatch(rf"[\d:]{{8}}  Unary  {MODEL}  OK  1 tokens  \d+ ms\n", capfd.readouterr().err)


def test_in_text_a_record_is_a_line_and_its_stack() -> None:
    try:
        raise ValueError("bad \ud800 value")
    except ValueError:
        stack = sys.exc_info()
    info = logging.LogRecord("x", logging.INFO, "", 1, "%d models", (3,), None)
    info.fields = {"pool": "a"}
    assert re.fullmatch(r"[\d:]{8}  3 models pool=a", TextFormatter().format(info))
    error = logging.LogRecord("x", logging.ERROR, "", 1, "no", (), stack)
    first, *rest = TextFormatter().format(error).splitlines()
    assert first.endswith("  error: no")
    assert rest[-1] == "ValueError: bad ? value"


async def test_lines_are_written_without_waiting_for_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(access_log=True) as house:
        await house.unary(metadata=(("x-request-id", "early"),))
        for _ in range(100):
            if '"early"' in capfd.readouterr().err:
                return
            await asyncio.sleep(0.05)
    raise AssertionError("no line while the server ran")


def test_log_lines_are_json_with_request_id_and_stack() -> None:
    token = current_call.set(Call(request_id="r7"))
    try:
        raise ValueError("bad \ud800 value")
    except ValueError:
        import sys

        record = logging.LogRecord(
            "a.b", logging.ERROR, __file__, 1, "went %s", ("wrong \ud800",), sys.exc_info()
        )
    finally:
        text = JsonFormatter().format(record)
        current_call.reset(token)
    line = json.loads(text)
    assert line["request_id"] == "r7"
    assert (line["level"], line["logger"], line["message"]) == ("error", "a.b", "went wrong ?")
    assert "ValueError: bad" in line["stack"]
    assert "\n" not in text


def test_times_are_rfc_3339() -> None:
    assert timestamp(0.0125) == "1970-01-01T00:00:00.012Z"


async def _get(port: int, request: bytes) -> tuple[str, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body


async def test_pages_for_scrapers_and_probes() -> None:
    ready = False
    exposition = Exposition(ready=lambda: ready)
    port = await exposition.start("127.0.0.1", 0)
    try:
        status, body = await _get(port, b"GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == "HTTP/1.1 200 OK"
        assert b"searchfoundation_requests_in_flight" in body
        assert (await _get(port, b"GET /live HTTP/1.1\r\n\r\n"))[1] == b'{"status":"ok"}'
        assert (await _get(port, b"GET /ready HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 503 Service Unavailable"
        ready = True
        assert await _get(port, b"GET /ready HTTP/1.0\r\n\r\n") == ("HTTP/1.1 200 OK", b'{"status":"ok"}')
        assert (await _get(port, b"HEAD /live HTTP/1.1\r\n\r\n")) == ("HTTP/1.1 200 OK", b"")
        assert (await _get(port, b"GET /other HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 404 Not Found"
        assert (await _get(port, b"POST /live HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 405 Method Not Allowed"
        assert (await _get(port, b"x" * 100_000))[0] == ""
        with pytest.raises(PortInUseError):
            await Exposition(ready=lambda: True).start("127.0.0.1", port)
    finally:
        await exposition.stop()


def test_pages_of_workers_are_put_together() -> None:
    page = (
        "# HELP searchfoundation_requests_total Calls.\n# TYPE searchfoundation_requests_total counter\n"
        'searchfoundation_requests_total{code="OK"} %d\n'
        "# HELP searchfoundation_queue_items Waiting.\n# TYPE searchfoundation_queue_items gauge\n"
        "searchfoundation_queue_items %d\n"
    )
    merged = merge({"0": page % (3, 1), "1": page % (4, 2)}).decode()
    assert merged.count("# TYPE searchfoundation_requests_total counter") == 1
    samples = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(merged)
        for sample in family.samples
    ]
    assert ("searchfoundation_requests_total", {"code": "OK", "worker": "1"}, 4.0) in samples
    assert ("searchfoundation_queue_items", {"worker": "0"}, 1.0) in samples


async def test_spans_reach_the_collector(tmp_path: Path) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

    received: list[Any] = []
    arrived = asyncio.Event()

    async def export(request: Any, _context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                received.extend(scope.spans)
        if len(received) >= 2:
            arrived.set()
        return service.ExportTraceServiceResponse()

    collector = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        export,
        request_deserializer=service.ExportTraceServiceRequest.FromString,
        response_serializer=service.ExportTraceServiceResponse.SerializeToString,
    )
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    collector.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": handler}),))
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def act(call: Call, request: Any) -> Any:
        if request.value == "no":
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="No.")
        return await echo(call, request)

    async with running(act, otlp_endpoint=f"http://127.0.0.1:{port}") as house:
        await house.unary(metadata=(("traceparent", f"00-{trace_id}-{parent}-01"), ("x-request-id", "r1")))
        await failure(house.unary("no"))
        await house.stop()
    await asyncio.wait_for(arrived.wait(), 100)
    await collector.stop(None)
    first, second = sorted(received, key=lambda span: span.start_time_unix_nano)
    attributes = {each.key: each.value for each in first.attributes}
    assert first.name == "probe.Probe/Unary"
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (trace_id, parent)
    assert attributes["searchfoundation.request_id"].string_value == "r1"
    assert attributes["searchfoundation.tokens"].int_value == 1
    assert attributes["searchfoundation.code"].string_value == "OK"
    assert second.status.message == "INPUT_INVALID"


async def test_a_log_that_nobody_reads_holds_up_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def __init__(self) -> None:
            self.unstick = threading.Event()

        def write(self, _text: str) -> None:
            self.unstick.wait()

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    stuck = Stuck()
    dropped = Change("searchfoundation_access_log_dropped_lines_total")
    monkeypatch.setattr(logs, "_BACKLOG", 2)
    monkeypatch.setattr(logs, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(logs, "_CLOSE_SECONDS", 0.0)
    monkeypatch.setattr(logs.sys, "stderr", stuck)
    async with running(access_log=True) as house:
        for _ in range(20):
            await house.unary()
    stuck.unstick.set()
    assert dropped() > 0

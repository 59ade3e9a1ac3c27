"""Every way a call can fail, as gRPC callers and as the gateway see it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import orjson
import pytest
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status as status_of_call

from services.core.call import Call
from services.core.errors import ERRORS, ErrorCode, FieldError, ServiceError, validation_error
from services.core.forms import FORMS, Form
from services.core.serving.failure import http_body, rpc_status
from tests.serving.probe import failure, reason, running, trailers

# What gRPC peers take of metadata unless told otherwise: 8 KiB, each entry counted with 32 bytes.
METADATA_LIMIT = 8192

FIELDS = {
    "codings": "gzip",
    "what": "A job",
    "model": "m",
    "available": "a, b",
    "min_labels": 2,
    "length": 9,
    "current": 7,
    "limit": 5,
    "reason": "Because.",
    "resource_type": "Classifier",
    "resource_id": "c1",
    "timeout_seconds": 2.5,
}


def raising(error: Exception) -> Any:
    async def act(_call: Call, _request: Any) -> Any:
        raise error

    return act


def details(error: grpc.aio.AioRpcError, kind: type[Message]) -> Any:
    """The detail of that type among those of the status."""
    status = status_pb2.Status.FromString(trailers(error)["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    raise AssertionError(f"no {kind.__name__} among the details")


def body(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    text = trailers(error)["sf-http-body"]
    assert isinstance(text, str)
    assert all(" " <= char <= "~" for char in text), "headers hold printable ASCII only"
    assert len(text) <= 4096
    parsed = orjson.loads(text)
    assert list(parsed)[:3] == ["detail", "code", "request_id"]
    return parsed


def metadata_size(error: grpc.aio.AioRpcError) -> int:
    sizes = (
        len(key) + (len(value) * 4 // 3 if isinstance(value, bytes) else len(value)) + 32
        for key, value in error.trailing_metadata() or ()
    )
    return sum(sizes) + len((error.details() or "").encode()) * 3


@pytest.mark.parametrize("code", list(ErrorCode))
async def test_every_code_of_the_table_reaches_both_wires(code: ErrorCode) -> None:
    async with running(raising(ServiceError(code, **FIELDS))) as house:
        typed = await failure(house.unary(metadata=(("x-request-id", "r1"),)))
        error = await failure(house.rest(metadata=(("x-request-id", "r1"),)))
    spec = ERRORS[code]
    detail = spec.template.format(**FIELDS)
    assert error.code() is spec.grpc_status
    assert error.details() == detail
    assert trailers(error)["sf-http-status"] == str(spec.http_status)
    assert trailers(error)["x-request-id"] == "r1"
    assert trailers(error)["x-ratelimit-remaining-requests"].isdigit()
    answer = body(error)
    told = answer.pop("error")
    assert answer == {"detail": detail, "code": code.value, "request_id": "r1"}
    assert (told["message"], set(told)) == (detail, {"message", "type", "param", "code"})
    info = details(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (code.value, "search-foundation")
    assert details(error, error_details_pb2.RequestInfo).request_id == "r1"
    assert ("retry-after" in trailers(error)) == (spec.http_status in (429, 503))
    # A gRPC caller gets the same, but for what only the gateway reads.
    assert (typed.code(), typed.details()) == (error.code(), error.details())
    for_the_gateway = {"sf-http-status", "sf-http-body"}
    assert trailers(typed) == {k: v for k, v in trailers(error).items() if k not in for_the_gateway}


@pytest.mark.parametrize("kind", ["Down", "Up", "Both"])
async def test_streams_fail_in_the_same_form(kind: str) -> None:
    async def requests() -> Any:
        yield StringValue(value="a")

    async with running(raising(ServiceError(ErrorCode.INPUT_INVALID, reason="No."))) as house:
        method = house.streaming(kind)
        call = method(StringValue(value="a")) if kind == "Down" else method(requests())
        error = await failure(call if kind == "Up" else call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(error) == "INPUT_INVALID"


async def test_retry_after_is_whole_seconds_and_retry_info_exact() -> None:
    busy = ServiceError(ErrorCode.SERVICE_UNAVAILABLE, retry_after=2.25)
    async with running(raising(busy)) as house:
        error = await failure(house.unary())
    assert trailers(error)["retry-after"] == "3"
    assert details(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 2250


async def test_headers_of_an_error_win_over_those_of_the_admission() -> None:
    refusal = ServiceError(
        ErrorCode.RATE_TOKEN_LIMIT_EXCEEDED, current=9, limit=8, headers={"x-ratelimit-remaining-tokens": "0"}
    )
    async with running(raising(refusal)) as house:
        error = await failure(house.unary())
    found = [value for key, value in error.trailing_metadata() or () if key == "x-ratelimit-remaining-tokens"]
    assert found == ["0"]


async def test_bad_fields_are_listed_on_both_wires() -> None:
    bad = [
        FieldError("body -> m -> task", "Input should be 'a' or 'b'", "enum", "c"),
        FieldError("body -> m -> dimensions", "Too many", "less_than_equal", 9999),
    ]
    async with running(raising(validation_error(bad))) as house:
        error = await failure(house.rest())
    assert trailers(error)["sf-http-status"] == "422"
    answer = body(error)
    assert list(answer) == ["detail", "code", "request_id", "error", "errors"]
    assert answer["errors"][1] == {
        "field": "body -> m -> dimensions",
        "message": "Too many",
        "type": "less_than_equal",
        "input": 9999,
    }
    violations = details(error, error_details_pb2.BadRequest).field_violations
    assert [(each.field, each.description) for each in violations] == [
        (each.field, each.message) for each in bad
    ]


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10_000_000,
        "\U0001f600" * 100_000,
        "\ud800 \x00 \x7f \" \\ \n",
        list(range(100_000)),
        {f"key {n}" * 50: {"deep": [[[["x" * 1000]]]]} for n in range(1000)},
        [[[[[[["x" * 500] * 50] * 50]]]]],
        10**5000,
        float("inf"),
        b"\xff" * 1000,
        None,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2048])
async def test_an_answer_fits_into_metadata_whatever_was_sent(value: object, count: int) -> None:
    text = value if isinstance(value, str) else "message " * 500
    error = FieldError(f"body -> {text[:5000]}", text, "some_type", value)
    async with running(raising(validation_error([error] * count))) as house:
        failed = await failure(house.rest())
    assert failed.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert 1 <= len(body(failed)["errors"]) <= count
    assert metadata_size(failed) <= METADATA_LIMIT
    assert len(details(failed, error_details_pb2.BadRequest).field_violations) >= 1


async def test_a_long_or_strange_detail_is_cut() -> None:
    model = "\ud800\U0001f600" + "ä" * 1_000_000
    unknown = ServiceError(ErrorCode.INPUT_MODEL_NOT_FOUND, model=model, available="a")
    async with running(raising(unknown)) as house:
        error = await failure(house.rest())
    assert trailers(error)["sf-http-status"] == "400"
    assert body(error)["detail"].endswith("...")
    assert (error.details() or "").startswith("Model '?\U0001f600äää")
    assert metadata_size(error) <= METADATA_LIMIT


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_code_has_each_vendors_form(form: Form) -> None:
    for code, spec in ERRORS.items():
        error = ServiceError(code, **FIELDS)
        body = orjson.loads(http_body(error, "id", f"{form.name}Embed"))
        plain = orjson.loads(http_body(error, "id"))
        expected = form.fields(code, spec.http_status, error.detail)
        assert body == plain | expected
        assert error.detail in orjson.dumps(expected).decode()
    long = http_body(ServiceError(ErrorCode.INPUT_INVALID, reason="é" * 9000), "id", f"{form.name}Embed")
    assert len(long) <= 3584
    assert orjson.loads(long).keys() >= {"detail", "code", "request_id", "error"}


async def test_an_unexpected_exception_tells_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with running(raising(KeyError("secret"))) as house:
        error = await failure(house.rest(metadata=(("x-request-id", "r9"),)))
        assert (await failure(house.unary())).code() is grpc.StatusCode.INTERNAL
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.trailing_metadata()) + str(error.details())
    assert body(error)["code"] == "INTERNAL_ERROR"
    record = caplog.records[0]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)
    assert record.fields["request_id"] == "r9"  # type: ignore[attr-defined]


async def test_a_timeout_inside_the_work_is_not_the_calls_deadline() -> None:
    async with running(raising(TimeoutError())) as house:
        assert (await failure(house.unary())).code() is grpc.StatusCode.INTERNAL


async def test_a_call_over_its_time_is_ended() -> None:
    cancelled = asyncio.Event()

    async def act(_call: Call, _request: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with running(act, request_timeout_seconds=0.05) as house:
        error = await failure(house.rest())
    assert cancelled.is_set()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert trailers(error)["sf-http-status"] == "504"
    assert body(error)["code"] == "SERVICE_TIMEOUT"
    assert "after 0.05 seconds" in body(error)["detail"]


async def test_a_callers_own_deadline_ends_its_call_and_its_work() -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def act(_call: Call, _request: Any) -> Any:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with running(act) as house:
        while not begun.is_set():
            error = await failure(house.unary(timeout=0.1))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(cancelled.wait(), 100)


async def test_bytes_that_do_not_parse_are_the_callers_error() -> None:
    async with running() as house:
        for path in ("/probe.Probe/Unary", "/probe.ProbeRestService/Do", "/probe.Probe/Up"):
            error = await failure(house.channel.unary_unary(path)(b"\xff\xff\xff"))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason(error) == "INPUT_INVALID"
        assert house.probe.calls == []


async def test_a_call_without_a_message_is_the_callers_error() -> None:
    async def nothing() -> Any:
        return
        yield

    async with running() as house:
        error = await failure(house.channel.stream_unary("/probe.Probe/Unary")(nothing()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", ["/probe.Probe/Nothing", "/nobody.Here/At", "/", "/x"])
async def test_an_unknown_method_is_unimplemented_in_the_documented_form(path: str) -> None:
    async with running() as house:
        error = await failure(house.channel.unary_unary(path)(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert reason(error) == "ROUTE_NOT_FOUND"


async def test_a_capability_may_end_a_call_itself() -> None:
    async with running() as house:

        async def refuse(_request: Any, context: Any) -> Any:
            await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

        house.probe._unary = refuse  # type: ignore[method-assign]
        # Handlers were registered at the start; a second server takes the new one.
        async with running(probe=house.probe) as other:
            error = await failure(other.unary())
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "gone")


async def test_the_status_of_one_message_of_a_stream_has_the_same_form() -> None:
    error = ServiceError(ErrorCode.INPUT_INVALID, reason="No.")
    async with running(raising(error)) as house:
        failed = await failure(house.unary(metadata=(("x-request-id", "r1"),)))
    assert status_of_call.from_call(failed) == rpc_status(error, "r1")


@pytest.mark.parametrize("handler", ["sync", "coroutine for a stream"])
async def test_a_handler_of_the_wrong_kind_is_refused_at_the_start(handler: str) -> None:
    from services.core.serving.dispatch import Dispatcher
    from services.core.serving.pipeline import Pipeline
    from tests.serving.probe import Probe, settings

    class Wrong(Probe):
        def add_to_server(self, server: grpc.aio.Server) -> None:
            def sync(request: Any, _context: Any) -> Any:
                return request

            async def coroutine(request: Any, _context: Any) -> Any:
                return request

            method = (
                grpc.unary_unary_rpc_method_handler(sync)
                if handler == "sync"
                else grpc.unary_stream_rpc_method_handler(coroutine)
            )
            server.add_registered_method_handlers("probe.Probe", {"Unary": method})

    dispatcher = Dispatcher(Pipeline(settings(), access=None, known_models=frozenset()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Probe/Unary"):
        dispatcher.add_capability(Wrong())


async def test_a_call_whose_work_was_cancelled_under_it_is_told_to_come_back() -> None:
    async def act(_call: Call, _request: Any) -> Any:
        lost = asyncio.get_running_loop().create_future()
        lost.cancel()
        await lost

    async with running(act) as house:
        error = await failure(house.unary())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "retry-after" in trailers(error)


async def test_work_that_answers_in_spite_of_its_deadline_is_answered() -> None:
    async def act(_call: Call, request: Any) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return request

    async with running(act, request_timeout_seconds=0.05) as house:
        assert (await house.unary("late")).value == "late"
        assert (await house.unary("again")).value == "again"

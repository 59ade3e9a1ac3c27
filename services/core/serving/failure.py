"""Rendering of errors: one failed call, told to gRPC callers and to the gateway at once.

A call ends with its gRPC status and ``google.rpc`` details in ``grpc-status-details-bin``. One of a REST
service also ends with ``sf-http-status`` and ``sf-http-body``, which the gateway answers with.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, cast

import grpc.aio
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

from services.core.call import Call
from services.core.errors import FieldError, ServiceError
from services.core.forms import form_of, formed_body
from services.core.preview import clip, percent_width

DOMAIN = "search-foundation"
HTTP_STATUS_HEADER = "sf-http-status"
"""Tells the gateway the status of an error, or that of a part of a file, beside LENGTH_HEADER."""
LENGTH_HEADER = "sf-content-length"
"""Tells the gateway how many bytes a streamed answer has: the transcoder drops what the service says."""

# gRPC peers take 8 KiB of metadata in all unless told otherwise, names and base64 included.
_BODY_BYTES = 3200
_MESSAGE_BYTES = 768
_DETAILS_BYTES = 1536
_INPUT_BYTES = 640
_SECOND_DETAIL_BYTES = 384

Metadata = tuple[tuple[str, str | bytes], ...]


def let_go(error: BaseException) -> None:
    """Take from an error, and from all that it came from, the frames of the call and what they hold.

    What ends a call lives on in gRPC's state of it, in a cycle that no collection comes for soon; the frames
    hold the whole request.
    """
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        pending += (each.__cause__, each.__context__)
        if isinstance(each, BaseExceptionGroup):
            pending += cast("BaseExceptionGroup[BaseException]", each).exceptions
        each.__traceback__ = each.__cause__ = each.__context__ = None


def failed_here(error: BaseException, call: Call) -> bool:
    """Whether a call, or a message of it, failed through no doing of its caller."""
    if isinstance(error, ServiceError):
        return error.spec.http_status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, asyncio.CancelledError):
        return call.expired
    return not isinstance(error, grpc.aio.BaseError)


def http_body(error: ServiceError, request_id: str, rpc: str = "") -> str:
    """The REST body in printable ASCII: that of ``error_body`` and, on 422, ``errors``.

    ``rpc`` is the name of the method: those of other vendors' paths fail in their form.

    At most ``_BODY_BYTES`` long: texts are cut, offending values previewed, entries beyond that left out.
    """
    param = error.field_errors[0].param if error.field_errors else None
    detail = clip(error.detail, _SECOND_DETAIL_BYTES)
    body = formed_body(form_of(rpc), error.code, detail, request_id, param=param)
    body["detail"] = error.detail
    if error.field_errors:
        body["errors"] = list(_entries(error, _BODY_BYTES - len(_dump(body)) - len(',"errors":[]')))
    return _dump(body)


def rpc_status(error: ServiceError, request_id: str) -> status_pb2.Status:
    """The same failure as ``google.rpc.Status`` with ErrorInfo, RequestInfo, RetryInfo and BadRequest."""
    status = status_pb2.Status(code=error.spec.grpc_status.value[0], message=grpc_message(error))
    _add(
        status,
        error_details_pb2.ErrorInfo(
            reason=error.code.value,
            domain=DOMAIN,
            metadata={"http_status": str(error.spec.http_status)},
        ),
    )
    _add(status, error_details_pb2.RequestInfo(request_id=request_id))
    seconds = retry_after(error)
    if seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(seconds * 1000))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.field_errors:
        _add(status, _bad_request(error, _DETAILS_BYTES - status.ByteSize()))
    return status


def retry_after(error: ServiceError) -> float | None:
    """Seconds to wait before trying again; every 429 and 503 says so."""
    if error.retry_after is None and error.spec.http_status in (429, 503):
        return 1.0
    return error.retry_after


def grpc_message(error: ServiceError) -> str:
    """The status message: the detail, bounded and free of characters that UTF-8 cannot carry."""
    return clip(error.detail, _MESSAGE_BYTES, percent_width)


def trailing_metadata(error: ServiceError, request_id: str, *, rest: bool, rpc: str = "") -> Metadata:
    """Everything that goes beside the gRPC status of a failed ``rpc``; ``rest`` adds the HTTP answer."""
    seconds = retry_after(error)
    retry = () if seconds is None else (("retry-after", str(max(1, math.ceil(seconds)))),)
    return (
        ("x-request-id", request_id),
        *(_http_answer(error, request_id, rpc) if rest else ()),
        ("grpc-status-details-bin", rpc_status(error, request_id).SerializeToString()),
        *retry,
        *error.headers.items(),
    )


def _http_answer(error: ServiceError, request_id: str, rpc: str) -> Metadata:
    return (
        (HTTP_STATUS_HEADER, str(error.spec.http_status)),
        ("sf-http-body", http_body(error, request_id, rpc)),
    )


def _entries(error: ServiceError, room: int) -> Iterator[dict[str, Any]]:
    for field_error in error.field_errors:
        entry = _entry(field_error)
        room -= len(_dump(entry)) + 1
        if room < 0:
            return
        yield entry


def _entry(error: FieldError) -> dict[str, Any]:
    shown = error.input
    return {
        "field": error.field,
        "message": error.message,
        "type": error.type,
        "input": shown if len(_dump(shown)) <= _INPUT_BYTES else f"({type(shown).__name__})",
    }


def _bad_request(error: ServiceError, room: int) -> error_details_pb2.BadRequest:
    violations: list[error_details_pb2.BadRequest.FieldViolation] = []
    for field_error in error.field_errors:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=field_error.field,
            description=field_error.message,
        )
        room -= violation.ByteSize() + 4
        if room < 0 and violations:
            break
        violations.append(violation)
    return error_details_pb2.BadRequest(field_violations=violations)


def _add(status: status_pb2.Status, detail: message.Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _dump(value: Any) -> str:
    # Python leaves DEL alone, which no header may hold.
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")

"""The REST door: jobs as JSON, files as streams with their ranges and conditions."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import grpc.aio
from google.api import httpbody_pb2
from searchfoundation.v1 import batch_rest_pb2, batch_rest_pb2_grpc

from services.batch.quotas import figures
from services.batch.schema import (
    BatchParser,
    File,
    JobStatus,
    of_query,
    parse_limit,
    parse_offset,
    status_json,
)
from services.batch.service import POLL_SECONDS, BatchService, Caller
from services.core.call import Call, current_call
from services.core.errors import ErrorCode, ServiceError
from services.core.serving.exchange import arrived_with
from services.core.serving.failure import HTTP_STATUS_HEADER, LENGTH_HEADER
from services.core.serving.rest import Body, decode, encode, raw_items

_TAG = re.compile(r'(?:W/)?"[^"]*"')
_ANY = "*"


def unchanged(etag: str, if_match: str, if_none_match: str) -> bool:
    """Whether a caller has the file with ``etag`` already, by its headers, which are empty when not sent.

    Raises ``ServiceError`` PRECONDITION_FAILED if it wants another file than this.
    """
    # A weak tag never matches strongly, as RFC 9110 (13.1.1) has it; If-None-Match compares weakly (13.1.2).
    if if_match and if_match.strip() != _ANY and etag not in _TAG.findall(if_match):
        raise ServiceError(ErrorCode.PRECONDITION_FAILED)
    known = {tag.removeprefix("W/") for tag in _TAG.findall(if_none_match)}
    return if_none_match.strip() == _ANY or etag in known


_ONE = re.compile(r"bytes=([0-9]{1,18})?-([0-9]{1,18})?")


def byte_range(header: str, length: int) -> range | None:
    """Give the bytes that are asked for of ``length``, None for all: nothing, or no single range, is named.

    Raises ``ServiceError`` RANGE_NOT_SATISFIABLE for a range that begins behind the end.
    """
    found = _ONE.fullmatch(header)
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found.groups()
    if first is None:  # the last bytes
        asked = range(max(0, length - int(last)), length)
    else:
        asked = range(int(first), length if last is None else min(int(last) + 1, length))
        if last is not None and int(last) < int(first):
            return None
    if not asked:
        raise ServiceError(
            ErrorCode.RANGE_NOT_SATISFIABLE, headers={"content-range": f"bytes */{length}"}, length=length
        )
    return asked


Context = grpc.aio.ServicerContext[Any, Any]

NDJSON = "application/x-ndjson"
BASE_URL_HEADER = "x-sf-base-url"
"""Set by the gateway: where the caller reached it."""
METHOD_HEADER = "x-sf-method"
"""Set by the gateway to HEAD: the caller wants no body."""


class BatchRestServicer(batch_rest_pb2_grpc.BatchRestServiceServicer):
    """``BatchRestService`` over the capability."""

    def __init__(self, parser: BatchParser, service: BatchService, public_url: str | None) -> None:
        self._parser = parser
        self._service = service
        self._public_url = public_url

    async def CreateBatch(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: Body, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``POST /v1/batch/embeddings``."""
        call = current_call.get()
        parsed = self._parser.parse(await decode(request, keep=True))
        if any(not isinstance(line.get("custom_id"), str) for line in parsed.lines or ()):
            # Such names are echoed, and a number may have more digits than a parser keeps.
            parsed = replace(parsed, lines=await raw_items(request, "input"))
        request.data = memoryview(b"")
        call.model = parsed.model
        status = await self._service.create(parsed, caller(call), base_url(self._public_url))
        call.headers = (("location", f"/v1/batch/{status.batch_id}"), _RETRY)
        return encode(status_json(status))

    async def ListBatches(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.ListBatchesByQueryRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /v1/batches``."""
        found = await self._service.list(current_call.get().key_id, parse_limit(of_query(request, "limit")))
        return encode([status_json(status) for status in found])

    async def GetBatch(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.BatchByPathRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /v1/batch/{batch_id}``."""
        call = current_call.get()
        return _answer(await self._service.status(request.batch_id, call.key_id), call)

    async def CancelBatch(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.BatchByPathRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``DELETE /v1/batch/{batch_id}``."""
        call = current_call.get()
        return _answer(await self._service.cancel(request.batch_id, call.key_id), call)

    async def GetQuota(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.QuotaRequest, context: Context
    ) -> httpbody_pb2.HttpBody:
        """Answer ``GET /v1/quota``."""
        asking = caller(current_call.get())
        used, tier = await self._service.quota(asking)
        return encode({"tier": asking.tier, "quotas": figures(used, tier)})

    async def DownloadOutput(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.BatchFileByPathRequest, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Answer ``GET /v1/batch/{batch_id}/output``."""
        async for piece in self._file(request, File.OUTPUT):
            yield piece

    async def DownloadErrors(  # noqa: N802 - named by the contract
        self, request: batch_rest_pb2.BatchFileByPathRequest, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        """Answer ``GET /v1/batch/{batch_id}/errors``."""
        async for piece in self._file(request, File.ERRORS):
            yield piece

    async def _file(
        self, request: batch_rest_pb2.BatchFileByPathRequest, file: File
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        offset = parse_offset(of_query(request, "offset"))
        call = current_call.get()
        found = await self._service.open(request.batch_id, call.key_id, file)
        etag = f'"{request.batch_id}-{file}"'
        if unchanged(etag, _header("if-match"), _header("if-none-match")):
            status = str(HTTPStatus.NOT_MODIFIED.value)
            call.headers = (("etag", etag), (HTTP_STATUS_HEADER, status), (LENGTH_HEADER, "0"))
            yield httpbody_pb2.HttpBody()
            return
        part = None if offset else _part_asked(etag, found.length)
        asked = range(offset, found.length) if part is None else part
        call.headers = (
            ("accept-ranges", "bytes"),
            ("etag", etag),
            ("content-disposition", f'attachment; filename="{request.batch_id}_{file}.jsonl"'),
            (LENGTH_HEADER, str(len(asked))),
            *(() if part is None else _partial(part, found.length)),
        )
        if _header(METHOD_HEADER) == "HEAD":
            yield httpbody_pb2.HttpBody(content_type=NDJSON)
            return
        empty = True
        async with aclosing(found.pieces(asked)) as pieces:
            async for piece in pieces:
                empty = False
                yield httpbody_pb2.HttpBody(content_type=NDJSON, data=piece)
        if empty:  # the type comes with the first piece, and no piece would be no answer
            yield httpbody_pb2.HttpBody(content_type=NDJSON)


_RETRY = ("retry-after", str(int(POLL_SECONDS)))


def caller(call: Call) -> Caller:
    """Give whom a call is for."""
    return Caller(call.key_id, call.tier)


def base_url(public_url: str | None) -> str:
    """Give where callers reach the gateway: as configured, or as this one did."""
    return _header(BASE_URL_HEADER) if public_url is None else public_url.rstrip("/")


def _part_asked(etag: str, length: int) -> range | None:
    """Give the part of a file that ``Range`` asks for, unless ``If-Range`` means another file."""
    if _header("if-range") not in ("", etag) or not length:
        return None
    return byte_range(_header("range"), length)


def _partial(part: range, length: int) -> tuple[tuple[str, str], ...]:
    return (
        ("content-range", f"bytes {part.start}-{part.stop - 1}/{length}"),
        (HTTP_STATUS_HEADER, str(HTTPStatus.PARTIAL_CONTENT.value)),
    )


def _header(name: str) -> str:
    """Give a header that the call has arrived with, empty if it has not."""
    return next((str(value) for key, value in arrived_with.get() if key == name), "")


def _answer(status: JobStatus, call: Call) -> httpbody_pb2.HttpBody:
    call.model = status.model
    if not status.state.ended:
        call.headers = (_RETRY,)
    return encode(status_json(status))

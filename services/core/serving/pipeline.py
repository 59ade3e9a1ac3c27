"""What every call passes, composed into one handler per method.

grpc.aio's own interceptors cost a coroutine and a lookup each and see a call only after its message has
been read. Here a method becomes a single handler that reads its messages itself: a call is authenticated and
admitted before its body is taken in, bytes that do not parse are the caller's error, and all four kinds of
method share one path: request id, tracing, deadline, authentication, limits, the servicer, errors, metrics,
access log.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
import grpc.aio
from google.api import httpbody_pb2
from google.protobuf.descriptor import Descriptor

from services.core.call import current_call
from services.core.errors import ErrorCode, ServiceError
from services.core.requests.limits import RequestLimits
from services.core.serving.bodies import Bodies
from services.core.serving.deadlines import Deadlines
from services.core.serving.exchange import Context, Exchange, Route, arrived_with, begin
from services.core.serving.failure import failed_here, let_go
from services.core.serving.logs import AccessLog
from services.core.serving.metrics import CALLS, CANCELLED
from services.core.settings import Settings

if TYPE_CHECKING:
    from services.core.access import AccessControl
    from services.core.serving.tracing import Tracing

logger = logging.getLogger(__name__)

_REST_SERVICE = "RestService"
"""What the contract has the names of services end with that the gateway calls for REST callers."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Work = Callable[[Exchange], Awaitable[bytes | None]]


class Pipeline:
    """Wraps the handlers of one server.

    ``known_models`` bounds the model label of metrics: whatever else a capability names is left out.
    """

    def __init__(
        self,
        settings: Settings,
        access: AccessControl,
        known_models: frozenset[str],
        access_log: AccessLog | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._access = access
        self._known_models = known_models
        self._access_log = access_log
        self._tracing = tracing
        self._timeout = settings.request_timeout_seconds
        self._limit = settings.max_concurrent_calls
        self._proxies = settings.trusted_proxies
        self._limits_addresses = settings.ip_requests_per_minute is not None
        self.bodies = Bodies(RequestLimits.of(settings))
        self._deadlines = Deadlines()
        self._calls = 0
        self._idle: asyncio.Event | None = None
        self._last_refusal = float("-inf")

    async def turn_away(self, seconds: float, *, at_most: float) -> None:
        """Wait ``seconds`` behind a ``drain``, and behind each call that it refuses meanwhile."""
        now = time.monotonic()
        end, until = now + at_most, now + seconds
        while (wait := min(until, end) - time.monotonic()) > 0:
            await asyncio.sleep(wait)
            until = self._last_refusal + seconds

    async def drain(self, seconds: float) -> None:
        """Refuse new calls as UNAVAILABLE and wait until those inside are answered, or ``seconds``."""
        self._limit = 0
        if self._calls == 0:
            return
        self._idle = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def wrap(self, capability: str, path: str, handler: Handler, largest: int) -> Handler:
        """Put the pipeline around an async handler of any of the four kinds.

        ``largest`` bounds a message in bytes.
        """
        streaming = handler.request_streaming or handler.response_streaming
        route = Route(
            capability,
            path,
            streaming,
            rest=path.rpartition("/")[0].endswith(_REST_SERVICE),
            parse=handler.request_deserializer,
            render=handler.response_serializer,
            largest=largest,
            kind=_kind(handler),
        )
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._entry(route, _streaming_work(path, handler)))
        return grpc.stream_unary_rpc_method_handler(self._entry(route, _unary_work(path, handler)))

    def _entry(self, route: Route, work: Work) -> Any:
        async def enter(_requests: Any, context: Context) -> bytes | None:
            exchange = begin(route, context, arrived_with.get(), self.bodies)
            current_call.set(exchange.call)
            if self._tracing is None:
                return await self._guarded(exchange, work)
            return await self._traced(self._tracing, exchange, work)

        return enter

    async def _traced(self, tracing: Tracing, exchange: Exchange, work: Work) -> bytes | None:
        metadata = {key: value for key, value in arrived_with.get() if isinstance(value, str)}
        with tracing.span(exchange.route.path, exchange.call, metadata) as span:
            try:
                return await self._guarded(exchange, work)
            finally:
                span.finish(exchange.code)

    async def _guarded(self, exchange: Exchange, work: Work) -> bytes | None:
        """Run the call, count it, and end it with the right status whatever happens."""
        self._calls += 1
        CALLS.in_flight += 1
        task = self._watch(exchange)
        try:
            if self._calls > self._limit:
                self._last_refusal = time.monotonic()
                raise ServiceError(ErrorCode.SERVICE_UNAVAILABLE)
            return await self._admitted(exchange, work)
        except BaseException as error:
            failure = self._failure(exchange, task, error)
            let_go(error)
            if failure is None:
                raise
            exchange.code = failure.code.value
        finally:
            self._deadlines.release(task)
            exchange.let_go()
            self._calls -= 1
            if self._calls == 0 and self._idle is not None:
                self._idle.set()
            CALLS.in_flight -= 1
            self._record(exchange)
        await exchange.fail(failure)
        return None

    def _watch(self, exchange: Exchange) -> asyncio.Task[Any]:
        """Put the call under its deadline: the caller's own, else, for unary calls, the server's."""
        task = asyncio.current_task()
        assert task is not None, "gRPC runs every call in a task"
        timeout = cast("float | None", exchange.context.time_remaining())
        if timeout is None and not exchange.route.streaming:
            timeout = self._timeout
        if timeout is not None:
            exchange.call.deadline = deadline = exchange.call.started + timeout
            self._deadlines.watch(task, deadline)
        return task

    def _failure(
        self, exchange: Exchange, task: asyncio.Task[Any], error: BaseException
    ) -> ServiceError | None:
        """What to tell the caller of an exception; None, with the code noted, if nothing can be told."""
        call = exchange.call
        if isinstance(error, ServiceError):
            if error.code is ErrorCode.INTERNAL_ERROR:
                logger.error("call failed", exc_info=error, extra=_fields(exchange))
            return error
        if isinstance(error, asyncio.CancelledError):
            if self._deadlines.release(task):
                seconds = round((call.deadline or call.started) - call.started, 3)
                return ServiceError(ErrorCode.SERVICE_TIMEOUT, timeout_seconds=seconds)
            if not task.cancelling():  # what it waited for was cancelled, as happens when things stop
                logger.warning("call lost what it waited for", exc_info=error, extra=_fields(exchange))
                return ServiceError(ErrorCode.SERVICE_UNAVAILABLE)
            # At a deadline of the caller's own, gRPC may cancel the call before we do.
            exchange.code = ErrorCode.SERVICE_TIMEOUT.value if call.expired else CANCELLED
            return None
        if isinstance(error, grpc.aio.AbortError):
            exchange.code = exchange.context.code().name
            return None
        if isinstance(error, grpc.aio.InternalError):  # reading or writing failed: the caller is gone
            exchange.code = CANCELLED
            return None
        if not isinstance(error, Exception):
            exchange.code = ErrorCode.INTERNAL_ERROR.value
            return None
        logger.error("call failed unexpectedly", exc_info=error, extra=_fields(exchange))
        return ServiceError(ErrorCode.INTERNAL_ERROR)

    async def _admitted(self, exchange: Exchange, work: Work) -> bytes | None:
        call = exchange.call
        address = None
        if self._limits_addresses:
            address = exchange.client_address(arrived_with.get(), self._proxies)
        principal = await self._access.authenticate(exchange.authorization, address)
        call.key_id = principal.key_id
        call.tier = principal.tier
        admission = await self._access.admit(principal)
        exchange.admission = admission
        call.charge, call.refund = admission.charge, admission.refund
        try:
            return await work(exchange)
        except BaseException as error:
            if failed_here(error, call):
                # What a stream has answered before it failed was worth its tokens.
                admission.refund(max(0, admission.charged - call.answered))
            raise
        finally:
            await admission.release()

    def _record(self, exchange: Exchange) -> None:
        call, route = exchange.call, exchange.route
        seconds = time.monotonic() - call.started
        model = call.model if call.model in self._known_models else ""
        CALLS.record(
            call,
            seconds,
            capability=route.capability,
            method=route.path,
            model=model,
            code=exchange.code,
        )
        if self._access_log is not None:
            self._access_log.write(
                {
                    "request_id": call.request_id,
                    "method": route.path,
                    "code": exchange.code,
                    "key_id": call.key_id,
                    "model": model,
                    "tokens": call.usage_tokens,
                    "seconds": round(seconds, 6),
                    "fetch": round(call.timings.fetch, 6),
                    "decode": round(call.timings.decode, 6),
                    "tokenize": round(call.timings.tokenize, 6),
                    "queue": round(call.timings.queue, 6),
                    "inference": round(call.timings.inference, 6),
                }
            )


def _kind(handler: Handler) -> Descriptor | None:
    """Return what describes the messages of a handler, None for those of a REST service."""
    parse: Any = handler.request_deserializer
    if parse is None or parse == httpbody_pb2.HttpBody.FromString:
        return None
    return parse.__self__.DESCRIPTOR


def _unary_work(path: str, handler: Handler) -> Work:
    behaviour: Any = handler.stream_unary if handler.request_streaming else handler.unary_unary
    if not inspect.iscoroutinefunction(behaviour):
        raise TypeError(f"the handler of {path} is not a coroutine function")
    if handler.request_streaming:

        async def gather(exchange: Exchange) -> bytes:
            return await exchange.answer(await behaviour(exchange.receive_all(), exchange.context))

        return gather

    async def answer(exchange: Exchange) -> bytes:
        return await exchange.answer(await behaviour(await exchange.receive(), exchange.context))

    return answer


def _streaming_work(path: str, handler: Handler) -> Work:
    behaviour: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream
    if not inspect.isasyncgenfunction(behaviour):
        raise TypeError(f"the handler of {path} is not an async generator function")

    async def stream(exchange: Exchange) -> None:
        request = exchange.receive_all() if handler.request_streaming else await exchange.receive()
        async with contextlib.aclosing(behaviour(request, exchange.context)) as responses:
            await exchange.answer_all(responses)

    return stream


def _fields(exchange: Exchange) -> dict[str, Any]:
    return {"fields": {"method": exchange.route.path, "request_id": exchange.call.request_id}}

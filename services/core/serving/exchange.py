"""One call on the wire: its messages parsed and rendered, its headers sent."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from pydantic import IPvAnyNetwork

from services.core.call import Call
from services.core.errors import ErrorCode, ServiceError
from services.core.serving.bodies import SMALL_BYTES, Bodies
from services.core.serving.failure import grpc_message, trailing_metadata
from services.core.serving.metrics import OK
from services.core.serving.rest import Body
from services.core.serving.wire import body_data

if TYPE_CHECKING:
    from services.core.access import Admission

Context = grpc.aio.ServicerContext[Any, Any]
ArrivalMetadata = Sequence[tuple[str, str | bytes]]
Headers = tuple[tuple[str, str], ...]

_WRAPPING_BYTES = 1 << 10
"""Of a message around the body of a REST call."""

_sane_request_id = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch


@dataclass(frozen=True, slots=True)
class Route:
    """One method: ``path`` is ``/package.Service/Method``. A missing codec passes bytes through.

    ``rest`` says that the gateway calls it for REST callers, and writes what it says as an HTTP answer. A
    message has at most ``largest`` bytes; ``kind`` describes it, None for the body of a REST call.
    """

    capability: str
    path: str
    streaming: bool
    rest: bool
    parse: Callable[[bytes], Any] | None
    render: Callable[[Any], bytes] | None
    largest: int = 0
    kind: Descriptor | None = None


@dataclass(slots=True)
class Exchange:
    """A call, its route and what became of it (``code``: ``OK``, ``CANCELLED`` or an error code)."""

    route: Route
    context: Context
    call: Call
    authorization: str | None
    bodies: Bodies
    admission: Admission | None = None
    code: str = OK
    held: int = 0

    async def receive(self) -> Any:
        """Read the only message of a unary request."""
        raw = await self.context.read()
        if raw is grpc.aio.EOF:
            raise ServiceError(ErrorCode.INPUT_INVALID, reason="The call holds no request message.")
        self._hold(len(raw))
        return await self._parse(raw)

    async def receive_all(self) -> AsyncIterator[Any]:
        """Read the messages of a streaming request as they come."""
        while (raw := await self.context.read()) is not grpc.aio.EOF:
            self._hold(len(raw))
            message = await self._parse(raw)
            self.let_go()  # what a stream holds at a time is its own affair
            yield message

    async def answer(self, response: Any) -> bytes:
        """Render the only message of a unary response, its headers first.

        The gateway turns leading metadata into HTTP headers; gRPC callers find the same entries in the
        trailing metadata, which costs no write of its own.
        """
        if not self.route.rest:
            self.context.set_trailing_metadata((*self._limits(), self._timing()))
            return self._render(response)
        # Others get their turn between the copies of a large answer.
        await self.context.send_initial_metadata((*self._limits(), *self.call.headers, self._timing()))
        return self._render(response)

    async def answer_all(self, responses: AsyncIterator[Any]) -> None:
        """Write the messages of a streaming response as they come."""
        begun = False
        async for response in responses:
            rendered = self._render(response)
            if self.route.rest and not begun:
                await self.context.send_initial_metadata(
                    (*self._limits(), *self.call.headers, self._timing())
                )
            begun = True
            await self.context.write(rendered)
        self.context.set_trailing_metadata((*self._limits(), self._timing()))

    async def fail(self, error: ServiceError) -> None:
        """End the call with an error; raises ``grpc.aio.AbortError`` as every abort does."""
        rpc = self.route.path.rpartition("/")[2]
        metadata = trailing_metadata(error, self.call.request_id, rest=self.route.rest, rpc=rpc)
        if self.admission is not None:
            present = {name for name, _ in metadata}
            metadata += tuple(item for item in self.admission.headers().items() if item[0] not in present)
        await self.context.abort(error.spec.grpc_status, grpc_message(error), metadata)

    def client_address(self, metadata: ArrivalMetadata, proxies: Sequence[IPvAnyNetwork]) -> str:
        """The caller's IP address: as the gateway saw it where that is the peer, else the peer's own.

        ``proxies`` are the networks of gateways. The last entry of ``x-forwarded-for`` is theirs; those
        before it are what a caller claims.
        """
        # ipv4:10.0.0.1:4242, ipv6:%5B::1%5D:4242, unix:...
        peer = unquote(self.context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
        if not _lies_in(peer, tuple(proxies)):
            return peer
        for key, value in metadata:
            if key == "x-envoy-external-address" and isinstance(value, str):
                return value
        for key, value in metadata:
            if key == "x-forwarded-for" and isinstance(value, str):
                return value.rpartition(",")[2].strip()
        return peer

    def let_go(self) -> None:
        """Count what the call has sent out of the bytes held."""
        if self.held:
            self.bodies.leave(self.held)
            self.held = 0

    def _hold(self, size: int) -> None:
        if size > self.route.largest + _WRAPPING_BYTES:
            raise ServiceError(ErrorCode.INPUT_TOO_LARGE, limit=self.route.largest)
        self.bodies.enter(size)
        self.held += size

    def _hold_more(self, size: int) -> None:
        self.bodies.enter(size, self.held)
        self.held += size

    async def _parse(self, raw: bytes) -> Any:
        route = self.route
        if route.parse is None:
            return raw
        try:
            if route.kind is None:
                return Body(body_data(raw), self.bodies, self.call.key_id, self._hold_more)
            if len(raw) <= SMALL_BYTES:
                return route.parse(raw)
            async with self.bodies.message(raw, route.kind, self.call.key_id, self._hold_more):
                return route.parse(raw)
        except DecodeError:
            reason = f"The request is not a message of the type that {route.path} takes."
            raise ServiceError(ErrorCode.INPUT_INVALID, reason=reason) from None

    def _render(self, response: Any) -> bytes:
        return response if self.route.render is None else self.route.render(response)

    def _limits(self) -> Headers:
        headers = () if self.admission is None else tuple(self.admission.headers().items())
        return (("x-request-id", self.call.request_id), *headers)

    def _timing(self) -> tuple[str, str]:
        timings = self.call.timings
        total = time.monotonic() - self.call.started
        media = ""
        if timings.fetch or timings.decode:
            media = f"fetch;dur={timings.fetch * 1e3:.2f}, decode;dur={timings.decode * 1e3:.2f}, "
        return (
            "server-timing",
            f"{media}tokenize;dur={timings.tokenize * 1e3:.2f}, queue;dur={timings.queue * 1e3:.2f}, "
            f"inference;dur={timings.inference * 1e3:.2f}, total;dur={total * 1e3:.2f}",
        )


@lru_cache(maxsize=4096)
def _lies_in(address: str, networks: tuple[IPvAnyNetwork, ...]) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip in network for network in networks)


arrived_with: ContextVar[ArrivalMetadata] = ContextVar("arrived_with")
"""The metadata of the call, kept from the look-up of its handler, since each call of
``context.invocation_metadata()`` makes all of it anew."""


def original_path() -> str:
    """Return the path of the REST call that became this one, with its query; empty for other calls."""
    return told_by_caller("x-envoy-original-path")


def told_by_caller(name: str) -> str:
    """Return a header of the REST call that the gateway lets through; empty where there is none."""
    return next((str(value) for key, value in arrived_with.get() if key == name), "")


def begin(route: Route, context: Context, metadata: ArrivalMetadata, bodies: Bodies) -> Exchange:
    """Start the exchange of an arriving call: take its request id, or make one."""
    request_id = ""
    authorization: str | None = None
    for key, value in metadata:
        if key == "x-request-id":
            request_id = value if isinstance(value, str) and _sane_request_id(value) else ""
        elif key == "authorization" and isinstance(value, str):
            # Several are joined, as the gateway does it, and are then no key.
            authorization = value if authorization is None else f"{authorization}, {value}"
    return Exchange(route, context, Call(request_id=request_id or uuid.uuid4().hex), authorization, bodies)

"""What the server needs from the rooms beside it, as narrow protocols."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import grpc.aio


class Capability(Protocol):
    """One capability: servicers under their full gRPC names.

    ``add_to_server`` registers handlers with the generated ``add_..._to_server`` functions. The server it
    gets takes handlers only, all of them async: coroutine functions, or async generator functions where the
    response is a stream. Each call runs inside the call pipeline, so a servicer finds its ``Call`` in
    ``current_call`` and raises ``ServiceError`` to fail.
    """

    @property
    def name(self) -> str:
        """Short name: the label of metrics and the word of ``search-foundation serve``."""
        ...

    @property
    def service_names(self) -> Sequence[str]:
        """Full names of the gRPC services, for health and reflection."""
        ...

    @property
    def max_body_bytes(self) -> int:
        """Largest message of a call in bytes."""
        ...

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the servicers."""
        ...

    async def start(self) -> None:
        """Get ready; health says SERVING after it has returned."""
        ...

    async def stop(self) -> None:
        """Let go of everything; no call is in flight any more."""
        ...


class Served(Protocol):
    """A model this process serves."""

    @property
    def id(self) -> str:
        """Short model id."""
        ...


class Engine(Protocol):
    """What the server wants to know of the inference engine."""

    @property
    def on_failure(self) -> Callable[[], None] | None:
        """What to call, in whatever thread, when a worker has died."""
        ...

    @on_failure.setter
    def on_failure(self, callback: Callable[[], None] | None) -> None: ...

    @property
    def served(self) -> Sequence[Served]:
        """The models this process serves."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether every worker is alive."""
        ...


class Principal(Protocol):
    """Whom a call is for."""

    @property
    def key_id(self) -> str:
        """Id of the key, never the key."""
        ...

    @property
    def tier(self) -> str:
        """Name of the plan."""
        ...


class Admission(Protocol):
    """A call that was let in, until it is released."""

    async def charge(self, tokens: int) -> None:
        """Book tokens; raises ``ServiceError`` when the key has none left."""
        ...

    def headers(self) -> Mapping[str, str]:
        """The remaining limits as headers, with lower-case names."""
        ...

    async def release(self, *, refund: bool = False) -> None:
        """Give the concurrency slot back; ``refund`` the tokens too when the call failed on our side."""
        ...


class Ping(Protocol):
    """Whether something answers; ``detail`` says why not."""

    @property
    def ok(self) -> bool:
        """Whether it does."""
        ...

    @property
    def detail(self) -> str:
        """The reason when it does not."""
        ...


class Access(Protocol):
    """Authentication and limits."""

    async def authenticate(self, authorization: str | None, address: str | None = None) -> Principal:
        """Resolve the ``authorization`` value of a call; raises ``ServiceError`` (401).

        ``address`` is the client's IP address, given where limits per address are set.
        """
        ...

    async def admit(self, principal: Any) -> Admission:
        """Take a call of someone ``authenticate`` returned in; raises ``ServiceError`` (429, 403)."""
        ...

    async def ping(self) -> Mapping[str, Ping]:
        """Ask what limits and keys stand on (``database``, ``redis``), for readiness."""
        ...

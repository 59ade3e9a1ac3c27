"""What the server asks of a capability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc.aio


class ServingCapability(Protocol):
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

"""Chat as a capability of a serving process."""

from __future__ import annotations

import grpc.aio
from searchfoundation.v1 import chat_pb2, chat_pb2_grpc, chat_rest_pb2, chat_rest_pb2_grpc

from services.chat.grpc import ChatServicer
from services.chat.logic import Chat
from services.chat.parsing import ChatParser
from services.chat.rest import ChatRestServicer
from services.core.catalog import Catalog
from services.core.inference import Engine
from services.core.requests.limits import RequestLimits
from services.core.settings import Settings


class ChatCapability:
    """``ChatService`` and ``ChatRestService`` over one engine."""

    name = "chat"
    service_names = (
        chat_pb2.DESCRIPTOR.services_by_name["ChatService"].full_name,
        chat_rest_pb2.DESCRIPTOR.services_by_name["ChatRestService"].full_name,
    )

    def __init__(self, engine: Engine, catalog: Catalog, settings: Settings) -> None:
        self.max_body_bytes = RequestLimits.of(settings).body("chat", engine.served)
        parser = ChatParser(catalog, engine.served, max_answer=settings.chat_max_answer_tokens)
        chat = Chat(engine, default=settings.chat_answer_tokens, seconds=settings.chat_timeout_seconds)
        self._typed = ChatServicer(parser, chat)
        self._rest = ChatRestServicer(parser, chat, settings.chat_heartbeat_seconds)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register both services."""
        chat_pb2_grpc.add_ChatServiceServicer_to_server(self._typed, server)
        chat_rest_pb2_grpc.add_ChatRestServiceServicer_to_server(self._rest, server)

    async def start(self) -> None:
        """Nothing to do: the engine is warm before it is handed over."""

    async def stop(self) -> None:
        """Nothing to let go of: the engine belongs to whoever started it."""


def build(engine: Engine, catalog: Catalog, settings: Settings) -> ChatCapability:
    """Make the capability for the models that ``engine`` serves."""
    return ChatCapability(engine, catalog, settings)

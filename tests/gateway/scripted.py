"""A gRPC service that does what the body of a request tells it, to put behind the real Envoy."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import grpc
from google.api import httpbody_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Metadata = dict[str, str | bytes]


class _Unknown(grpc.GenericRpcHandler):
    """Notes what else is called; gRPC then says that it is not implemented."""

    def __init__(self, called: list[Metadata]) -> None:
        self._known = ("Health", "CreateEmbeddings", "EmbedService", "OpsService")
        self._called = called

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        method: str = handler_call_details.method
        if not any(name in method for name in self._known):
            self._called.append({str(k): v for k, v in handler_call_details.invocation_metadata})


class ScriptedService:
    """Answers every method it has with what arrived, or acts on ``{"do": ...}``; notes calls of others."""

    def __init__(
        self,
        name: str,
        port: int = 0,
        credentials: grpc.ServerCredentials | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.name = name
        self.host = host
        self.port = port
        self.calls: list[tuple[str, Metadata, bytes]] = []
        self.unknown: list[Metadata] = []
        self.cancelled = threading.Event()
        self.ready = b'{"status":"ok","checks":{"engine":"ok"}}'
        self.credentials = credentials
        self.health = health.HealthServicer()
        self._server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        server = grpc.server(
            ThreadPoolExecutor(32),
            options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        server.add_generic_rpc_handlers((_Unknown(self.unknown),))
        for service, method in (
            ("EmbedRestService", "CreateEmbeddings"),
            ("EmbedService", "Embed"),
            ("OpsService", "Ready"),
        ):
            handler = grpc.unary_unary_rpc_method_handler(getattr(self, f"_{method.lower()}"))
            name = f"searchfoundation.v1.{service}"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {method: handler}),))
        address = self.address
        if self.credentials is None:
            self.port = server.add_insecure_port(address)
        else:
            self.port = server.add_secure_port(address, self.credentials)
        self.health.set("", SERVING)
        server.start()
        self._server = server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def _createembeddings(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        body = httpbody_pb2.HttpBody.FromString(request).data
        metadata = self._note("CreateEmbeddings", body, context)
        answer = json.dumps(
            {
                "service": self.name,
                "length": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
                "metadata": {k: v for k, v in metadata.items() if isinstance(v, str)},
            }
        ).encode()
        try:
            script = json.loads(body)
        except (ValueError, RecursionError):
            script = None
        if isinstance(script, dict) and "do" in script:
            answer = self._do(cast("dict[str, Any]", script), context) or answer
        return httpbody_pb2.HttpBody(content_type="application/json", data=answer).SerializeToString()

    def _embed(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note("Embed", request, context)
        context.set_trailing_metadata((("served-by", self.name),))
        if request == b"fail":
            context.set_trailing_metadata((("served-by", self.name), ("retry-after", "7")))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "typed failure")
        return request

    def _ready(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        self._note("Ready", b"", context)
        return httpbody_pb2.HttpBody(content_type="application/json", data=self.ready).SerializeToString()

    def _note(self, method: str, body: bytes, context: grpc.ServicerContext) -> Metadata:
        metadata = {str(k): v for k, v in context.invocation_metadata()}
        self.calls.append((method, metadata, body))
        return metadata

    def _do(self, script: dict[str, Any], context: grpc.ServicerContext) -> bytes | None:
        context.add_callback(self.cancelled.set)
        if headers := script.get("headers"):
            context.send_initial_metadata(tuple(headers.items()))
        match script["do"]:
            case "abort":
                context.set_trailing_metadata(tuple(script.get("trailers", {}).items()))
                context.abort(grpc.StatusCode[script["status"]], script.get("message", "an é"))
            case "raise":
                raise RuntimeError("a secret of the service")
            case "sleep":
                self.cancelled.clear()
                time.sleep(script["seconds"])
            case "answer":
                return b'"' + b"x" * (script["bytes"] - 2) + b'"'
            case "fail_once" if len(self.calls) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "queue full")
            case _:
                pass
        return None

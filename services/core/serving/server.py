"""The gRPC server of one process: start, health, draining, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from services.core.serving.capability import ServingCapability
from services.core.serving.certificates import Certificates
from services.core.serving.dispatch import Dispatcher
from services.core.serving.health import HealthServices
from services.core.serving.logs import AccessLog
from services.core.serving.pipeline import Pipeline
from services.core.serving.ports import PortInUseError, join
from services.core.serving.ready import ReadyServicer
from services.core.settings import Settings

if TYPE_CHECKING:  # they load torch and SQLAlchemy, which the supervisor of several workers does without
    from services.core.access import AccessControl
    from services.core.inference import Engine
    from services.core.serving.tracing import Tracing

logger = logging.getLogger(__name__)

# gRPC itself refuses without details; what is a little too large is told in words.
_MESSAGE_OVERHEAD = 64 << 10

_REFUSE_SECONDS = 0.2


class StopReason(Enum):
    """Why the server stops."""

    TERMINATED = "terminated"
    INTERRUPTED = "interrupted"
    ENGINE_FAILED = "engine failed"


class Server:
    """Serves capabilities until it is told to stop or the engine fails.

    ``engine`` and ``access`` belong to the caller, who started them and stops them afterwards. With
    ``share_port`` several processes may listen on one port.
    """

    def __init__(
        self,
        settings: Settings,
        capabilities: Sequence[ServingCapability],
        engine: Engine,
        access: AccessControl,
        *,
        share_port: bool = False,
    ) -> None:
        self._settings = settings
        self._capabilities = capabilities
        self._engine = engine
        self._share_port = share_port
        self._names = [name for capability in capabilities for name in capability.service_names]
        self._health = HealthServices(self._names)
        self._ready = ReadyServicer(self._engine_serves, access)
        self._access_log = AccessLog(text=settings.logs_text(sys.stderr)) if settings.access_log else None
        self._tracing = _tracing(settings)
        known_models = frozenset(spec.id for spec in engine.served)
        self._pipeline = Pipeline(settings, access, known_models, self._access_log, self._tracing)
        self._dispatcher = Dispatcher(self._pipeline)
        self._reason: asyncio.Future[StopReason] | None = None
        self._grpc: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        """Where the server listens, as ``host:port``."""
        return join(self._settings.host, self.port)

    @property
    def ready(self) -> bool:
        """Whether health says SERVING."""
        return self._health.serving

    async def start(self) -> None:
        """Listen as NOT_SERVING, start the capabilities, then say SERVING.

        Raises:
            PortInUseError: the address is taken.
            OSError: a TLS file cannot be read.
        """
        loop = asyncio.get_running_loop()
        self._reason = loop.create_future()
        for capability in self._capabilities:
            self._dispatcher.add_capability(capability)
        reflect = self._settings.reflection
        self._dispatcher.add_public(self._health, self._ready, self._names, reflect=reflect)
        await self._health.begin()
        largest = max(capability.max_body_bytes for capability in self._capabilities)
        self._grpc = grpc.aio.server(options=_options(self._settings, largest, self._share_port))
        self._grpc.add_generic_rpc_handlers((self._dispatcher,))
        self.port = self._bind(self._grpc)
        await self._grpc.start()
        for capability in self._capabilities:
            await capability.start()

        def on_failure() -> None:
            loop.call_soon_threadsafe(self._on_engine_failure)

        self._engine.on_failure = on_failure
        if not self._engine.healthy:
            self._on_engine_failure()
            return
        await self._health.up()

    async def wait(self) -> StopReason:
        """Wait until there is a reason to stop; the caller then calls ``stop``."""
        assert self._reason is not None, "start comes first"
        return await asyncio.shield(self._reason)

    def request_stop(self, reason: StopReason) -> None:
        """Make ``wait`` return. For use on the event loop; only the first reason counts."""
        if self._reason is not None and not self._reason.done():
            self._reason.set_result(reason)

    async def stop(self, *, drain: bool = True) -> None:
        """Say NOT_SERVING, let balancers notice, refuse new calls, finish those in flight, and let go.

        Takes ``grace_seconds`` at most; calls unfinished by then are cancelled. ``drain=False`` skips the
        time for balancers.
        """
        assert self._grpc is not None, "start comes first"
        deadline = time.monotonic() + self._settings.grace_seconds
        await self._health.down()
        if drain:
            await asyncio.sleep(min(self._settings.drain_seconds, self._settings.grace_seconds / 2))
        # gRPC itself answers calls that arrive while it shuts down with CANCELLED, which no client retries.
        # So callers who heed no health are told UNAVAILABLE first, as long as they come but not for ever.
        refusing = self._pipeline.turn_away(
            _REFUSE_SECONDS if drain else 0.0, at_most=self._settings.grace_seconds / 10
        )
        await asyncio.gather(self._pipeline.drain(deadline - time.monotonic()), refusing)
        self._dispatcher.close_public_streams()
        await self._grpc.stop(max(0.0, deadline - time.monotonic()))
        for capability in self._capabilities:
            await capability.stop()
        if self._access_log is not None:
            await asyncio.to_thread(self._access_log.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)

    def stop_on_signals(self) -> None:
        """Make SIGTERM and SIGINT request a stop; a second one ends the process at once."""
        loop = asyncio.get_running_loop()
        reasons = {signal.SIGTERM: StopReason.TERMINATED, signal.SIGINT: StopReason.INTERRUPTED}

        def on_signal(reason: StopReason) -> None:
            self.request_stop(reason)
            for number in reasons:
                loop.remove_signal_handler(number)

        for number, reason in reasons.items():
            loop.add_signal_handler(number, on_signal, reason)

    def _engine_serves(self) -> bool:
        return self._health.serving and self._engine.healthy

    def _on_engine_failure(self) -> None:
        logger.error("the engine failed; shutting down")
        self.request_stop(StopReason.ENGINE_FAILED)

    def _bind(self, server: grpc.aio.Server) -> int:
        settings = self._settings
        address = join(settings.host, settings.grpc_port)
        try:
            if settings.tls_cert is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, _credentials(settings))
        except RuntimeError:
            raise PortInUseError(settings.host, settings.grpc_port) from None
        return port


def _options(settings: Settings, largest: int, share_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.max_receive_message_length", largest + largest // 4 + _MESSAGE_OVERHEAD),
        ("grpc.max_send_message_length", -1),
        # Dead peers are noticed within 80 s; a proxy may ping as often as every 5 s, calls or not.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Beyond the limit of calls a call is refused in words, which needs a stream to say it on.
        ("grpc.max_concurrent_streams", 2 * settings.max_concurrent_calls),
    ]


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    assert settings.tls_cert is not None
    assert settings.tls_key is not None
    return Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca).credentials()


def _tracing(settings: Settings) -> Tracing | None:
    if settings.otlp_endpoint is None:
        return None
    from services.core.serving.tracing import Tracing

    return Tracing(settings.otlp_endpoint)

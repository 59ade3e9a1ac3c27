"""OpenTelemetry traces: one server span per call. Imported only when ``SF_OTLP_ENDPOINT`` is set."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.core.call import Call
from services.core.serving.metrics import OK


class Tracing:
    """Exports spans to an OTLP/gRPC endpoint; callers' ``traceparent`` is continued."""

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "search-foundation"}))
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("searchfoundation")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, method: str, call: Call, metadata: Mapping[str, str]) -> Generator[CallSpan]:
        """Make the span of one call the current one; ``method`` is ``/package.Service/Method``."""
        service, _, name = method.lstrip("/").partition("/")
        with self._tracer.start_as_current_span(
            f"{service}/{name}",
            context=self._propagator.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": name,
                "searchfoundation.request_id": call.request_id,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield CallSpan(span, call)

    def stop(self) -> None:
        """Send what is left. Blocks for seconds when the endpoint does not answer."""
        self._provider.shutdown()


class CallSpan:
    """A span that is closed with what became of its call."""

    def __init__(self, span: trace.Span, call: Call) -> None:
        self._span = span
        self._call = call

    def finish(self, code: str) -> None:
        """Note the outcome: ``OK``, ``CANCELLED`` or an error code."""
        call = self._call
        self._span.set_attributes(
            {
                "searchfoundation.code": code,
                "searchfoundation.key_id": call.key_id,
                "searchfoundation.model": call.model,
                "searchfoundation.tokens": call.usage_tokens,
                "searchfoundation.fetch_seconds": call.timings.fetch,
                "searchfoundation.decode_seconds": call.timings.decode,
                "searchfoundation.tokenize_seconds": call.timings.tokenize,
                "searchfoundation.queue_seconds": call.timings.queue,
                "searchfoundation.inference_seconds": call.timings.inference,
            }
        )
        if code != OK:
            self._span.set_status(trace.StatusCode.ERROR, code)

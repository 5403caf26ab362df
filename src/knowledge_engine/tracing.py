"""Traces for OpenTelemetry: one for each call, over gateway, server and engine; the only opentelemetry.

Off, with nothing of the SDK imported, unless OTEL_EXPORTER_OTLP_ENDPOINT is set; the SDK reads every other OTEL_*
variable itself. Spans hold times, names and counts, never a text.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as SdkSpan
    from opentelemetry.trace import Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_LAST_SECONDS = 1.5
"""For the last spans to leave, when the process ends."""

# What a server is to blame for, by the conventions for gRPC; the rest is the caller's.
_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

_LOG = logging.getLogger(__name__)


class Span:
    """One call while it is served. This one is in no trace: nothing becomes of what it is told."""

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Adds attributes, named as OpenTelemetry's conventions have them."""

    def add_phases(self, seconds: Mapping[str, float]) -> None:
        """Adds what the call consisted of, by name and one after the other, the last of which ends now."""

    def end(self, code: str) -> None:
        """Ends it with the name of a gRPC status."""


_NO_SPAN = Span()
SPAN: ContextVar[Span] = ContextVar("span", default=_NO_SPAN)
"""Of the call being served."""


class Traces:
    """The traces that this process takes part in, under the name `knowledge-PART` unless OTEL_SERVICE_NAME is set."""

    def __init__(self, part: str) -> None:
        self.provider: TracerProvider | None = _provider(f"knowledge-{part}") if _is_wanted() else None
        self._tracer: Tracer | None = self.provider.get_tracer("knowledge_engine") if self.provider else None

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What tells another process the trace of the current span (W3C Trace Context)."""
        if self._tracer is None:
            return ()
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return tuple(carrier.items())

    def start_call(self, method: str, headers: Mapping[str, str]) -> Span:
        """The span of a gRPC call, in the trace that its caller's headers name, and `SPAN` from now on. Whoever starts
        it ends it."""
        if self._tracer is None:
            return SPAN.get()
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            method,
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
        )
        recorded = _Recorded(self._tracer, span)
        SPAN.set(recorded)  # each call is served in a context of its own
        return recorded

    def close(self) -> None:
        """Sends what is left, as far as it leaves at once."""
        if self.provider is not None:
            thread = threading.Thread(target=self.provider.shutdown, name="traces", daemon=True)
            thread.start()
            thread.join(_LAST_SECONDS)


class _Recorded(Span):
    def __init__(self, tracer: Tracer, span: SdkSpan) -> None:
        self._tracer = tracer
        self._span = span

    def set(self, attributes: Mapping[str, Any]) -> None:
        self._span.set_attributes(dict(attributes))

    def add_phases(self, seconds: Mapping[str, float]) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        at = time.time() - sum(seconds.values())
        for name, duration in seconds.items():
            phase = self._tracer.start_span(name, context=context, start_time=int(at * 1e9))
            at += duration
            phase.end(int(at * 1e9))

    def end(self, code: str) -> None:
        self._span.set_attribute("rpc.response.status_code", code)
        if code in _FAULTS:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", code)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _is_wanted() -> bool:
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return False
    protocol = next((value for name in _PROTOCOLS if (value := os.environ.get(name))), "grpc")
    if protocol != "grpc":
        _LOG.warning(
            "no traces: they are sent by OTLP over gRPC alone, and OTEL_EXPORTER_OTLP_PROTOCOL is %s", protocol
        )
    return protocol == "grpc"


def _provider(name: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: name}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider

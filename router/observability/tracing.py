"""Spans of requests in gateway and group, through OpenTelemetry.

Off by default; without tracing no part of OpenTelemetry is imported. The client's W3C `traceparent`
is the parent of the gateway's span; the gateway sends its own `traceparent` with the request to the
leader, whose span counts steps. Knows spans; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arriero.shards.errors import SpecError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

Attributes = Mapping[str, str | int | float]


@dataclass(frozen=True, kw_only=True, slots=True)
class TracingConfig:
    """Configuration of tracing.

    Attributes:
        endpoint: URL of an OTLP collector over HTTP, such as "http://127.0.0.1:4318/v1/traces".
        sample: share of recorded traces among traces that start here; for traces that start in
            the client, the client's decision counts.
    """

    endpoint: str
    sample: float = 1.0


class Tracing:
    """Makes spans.

    Args:
        service: service name of the spans.
        exporter: receives the spans in batches, in a separate thread.
        sample: see `TracingConfig`.

    Raises:
        SpecError: OpenTelemetry is not installed.
    """

    def __init__(self, service: str, exporter: SpanExporter, sample: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            sampler=ParentBasedTraceIdRatio(sample),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("arriero")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_config(cls, service: str, config: TracingConfig | None) -> Tracing | None:
        """Tracing of a configuration; None for None.

        Raises:
            SpecError: OpenTelemetry is not installed.
        """
        if config is None:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise SpecError(
                f"`tracing` needs OpenTelemetry ({error}); install arriero[trace]"
            ) from None
        return cls(service, OTLPSpanExporter(endpoint=config.endpoint), config.sample)

    def begin(self, name: str, parent: str, attributes: Attributes) -> ActiveSpan:
        """Start a span.

        Args:
            name: name of the span.
            parent: a W3C `traceparent`; "" or a malformed value starts a new trace.
            attributes: first attributes of the span.
        """
        context = self._propagator.extract({"traceparent": parent}) if parent else None
        return ActiveSpan(self, self._tracer.start_span(name, context, attributes=dict(attributes)))

    def header(self, span: Span) -> str:
        """The `traceparent` of a span."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent", "")

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()


class ActiveSpan:
    """A span that has started."""

    __slots__ = ("_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def header(self) -> str:
        """The `traceparent` of the span."""
        return self._tracing.header(self._span)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Add an event."""
        self._span.add_event(name, dict(attributes or {}))

    def end(self, attributes: Attributes, error: str = "") -> None:
        """End the span with further attributes; `error` is the cause of a failure."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()

"""Spans of requests, from the gateway to the group that computes them, through OpenTelemetry.

Off unless a deployment asks for it; then nothing here is imported or called. The caller's W3C
`traceparent` is the parent of the gateway's span, and that travels with the request to the leader,
whose span tells of steps. Knows spans; knows nothing of what is traced.
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
    """Where spans go.

    Attributes:
        endpoint: of an OTLP collector over HTTP, such as "http://127.0.0.1:4318/v1/traces".
        sample: the part of traces that are kept, of those that no caller began; a caller's own
            decision is followed.
    """

    endpoint: str
    sample: float = 1.0


class Tracing:
    """Makes spans.

    Args:
        service: what the spans are said to come from.
        exporter: takes them, in batches, in a thread of its own.
        sample: as in `TracingConfig`.

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
        self._wire = TraceContextTextMapPropagator()

    @classmethod
    def from_config(cls, service: str, config: TracingConfig | None) -> Tracing | None:
        """What `config` asks for; None for None.

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

    def begin(self, name: str, parent: str, attributes: Attributes) -> Trace:
        """Begin a span.

        Args:
            name: its name.
            parent: a W3C `traceparent`; "" begins a trace. One that is malformed does too.
            attributes: facts known already.
        """
        context = self._wire.extract({"traceparent": parent}) if parent else None
        return Trace(self, self._tracer.start_span(name, context, attributes=dict(attributes)))

    def header(self, span: Span) -> str:
        """The span's own `traceparent`."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._wire.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent", "")

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class Trace:
    """One span that has begun."""

    __slots__ = ("_span", "_tracing")

    def __init__(self, tracing: Tracing, span: Span) -> None:
        self._tracing = tracing
        self._span = span

    @property
    def header(self) -> str:
        """The `traceparent` to pass on."""
        return self._tracing.header(self._span)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Note a moment."""
        self._span.add_event(name, dict(attributes or {}))

    def end(self, attributes: Attributes, error: str = "") -> None:
        """End it, with what is known now; `error` says why it failed."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()

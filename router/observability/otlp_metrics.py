"""Export of a gateway's metrics to an OTLP collector, beside `/metrics`.

Reads the same registry as `/metrics` at regular times, so both always agree; the names are those of
`/metrics` without `_total`. Off by default; without an endpoint no part of OpenTelemetry is
imported. Knows metric families and the collector; knows nothing of what the metrics mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Metric

from arriero.shards.errors import SpecError

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import MetricExporter, MetricsData

log = logging.getLogger(__name__)

_LAST_EXPORT_S = 2.0

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OtlpMetricsConfig:
    """Configuration of the export.

    Attributes:
        endpoint: URL of an OTLP collector over HTTP, such as "http://127.0.0.1:4318/v1/metrics".
        period_s: seconds between two exports.
    """

    endpoint: str
    period_s: float = 15.0


class OtlpMetrics:
    """Exports metrics at regular times.

    Args:
        collect: gives the metric families; called on the event loop, as each number is counted
            there.
        instance: `service.instance.id` of the metrics; tells gateways apart.
        exporter: sends the metrics; called in a thread.
        period_s: see `OtlpMetricsConfig`.
    """

    def __init__(
        self,
        collect: Callable[[], Iterable[Metric]],
        instance: str,
        exporter: MetricExporter,
        period_s: float,
    ) -> None:
        self._collect, self._instance, self._exporter = collect, instance, exporter
        self._period_s = period_s
        self._began_ns = time.time_ns()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def from_config(
        cls,
        config: OtlpMetricsConfig | None,
        collect: Callable[[], Iterable[Metric]],
        instance: str,
    ) -> OtlpMetrics | None:
        """The export of a configuration; None for None.

        Raises:
            SpecError: OpenTelemetry is not installed.
        """
        if config is None:
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        except ImportError as error:
            raise SpecError(
                f"`otlp_metrics` needs OpenTelemetry ({error}); install arriero[trace]"
            ) from None
        exporter = OTLPMetricExporter(endpoint=config.endpoint)
        return cls(collect, instance, exporter, config.period_s)

    def start(self) -> None:
        """Start to export."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Export once more, and end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._export(), _LAST_EXPORT_S)
        await asyncio.to_thread(self._exporter.shutdown)  # also ends an export that tries again

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            await self._export()

    async def _export(self) -> None:
        data = metrics_data(list(self._collect()), self._instance, self._began_ns)
        try:
            await asyncio.to_thread(self._exporter.export, data)
        except Exception as error:  # an exporter must not end the export for good
            log.warning("metrics were not exported: %s", error)


def metrics_data(families: Iterable[Metric], instance: str, began_ns: int) -> MetricsData:
    """Metric families as OTLP's data.

    Args:
        families: of the Prometheus library.
        instance: `service.instance.id`.
        began_ns: start of all counters, in nanoseconds since 1970.
    """
    from opentelemetry.sdk.metrics import export
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    now_ns = time.time_ns()
    metrics = []
    for family in families:
        points = _points(family, began_ns, now_ns)
        if not points:
            continue
        data: Any
        cumulative = export.AggregationTemporality.CUMULATIVE
        if family.type == "histogram":
            data = export.Histogram(data_points=points, aggregation_temporality=cumulative)
        elif family.type == "counter":
            data = export.Sum(
                data_points=points, aggregation_temporality=cumulative, is_monotonic=True
            )
        else:
            data = export.Gauge(data_points=points)
        metrics.append(
            export.Metric(name=family.name, description=family.documentation, unit="", data=data)
        )
    resource = Resource.create({"service.name": "arriero-gateway", "service.instance.id": instance})
    scope = export.ScopeMetrics(
        scope=InstrumentationScope("arriero"), metrics=metrics, schema_url=""
    )
    return export.MetricsData(
        resource_metrics=[
            export.ResourceMetrics(resource=resource, scope_metrics=[scope], schema_url="")
        ]
    )


def _points(family: Metric, began_ns: int, now_ns: int) -> Sequence[Any]:
    """The data points of a family: for a histogram one for each set of labels."""
    from opentelemetry.sdk.metrics.export import NumberDataPoint

    if family.type == "histogram":
        return _histograms(family, began_ns, now_ns)
    return [
        NumberDataPoint(
            attributes=dict(sample.labels),
            start_time_unix_nano=began_ns,
            time_unix_nano=now_ns,
            value=sample.value,
        )
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]


def _histograms(family: Metric, began_ns: int, now_ns: int) -> Sequence[Any]:
    from opentelemetry.sdk.metrics.export import HistogramDataPoint

    bounds: dict[Labels, list[tuple[float, float]]] = {}
    sums: dict[Labels, float] = {}
    for sample in family.samples:
        labels = dict(sample.labels)
        if sample.name.endswith("_bucket"):
            bound = float(labels.pop("le"))
            bounds.setdefault(tuple(sorted(labels.items())), []).append((bound, sample.value))
        elif sample.name.endswith("_sum"):
            sums[tuple(sorted(labels.items()))] = sample.value
    points = []
    for key, buckets in bounds.items():
        buckets.sort()
        counts = [int(count) for _, count in buckets]  # cumulative in Prometheus, not in OTLP
        points.append(
            HistogramDataPoint(
                attributes=dict(key),
                start_time_unix_nano=began_ns,
                time_unix_nano=now_ns,
                count=counts[-1],
                sum=sums.get(key, 0.0),
                bucket_counts=[b - a for a, b in zip([0, *counts], counts, strict=False)],
                explicit_bounds=[bound for bound, _ in buckets[:-1]],
                min=float("nan"),
                max=float("nan"),
            )
        )
    return points

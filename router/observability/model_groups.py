"""The groups of a model in numbers: desired, serving, started.

A deployment's registry knows them, and every gateway exports the same numbers. Knows names and
metric families; knows nothing of the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.router.backend import GroupView


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelGroups:
    """The groups of a model.

    Attributes:
        wanted: desired number of groups.
        starts: number of groups that ever started, restarts included.
        start_s: by group that serves, seconds from placed slices to the first token.
    """

    wanted: int = 0
    starts: int = 0
    start_s: Mapping[str, float] = field(default_factory=dict)


class ModelGroupFamilies(Collector):
    """The counts of all models as metric families.

    Args:
        counts: gives the counts by model; called at each export.
        models: gives the ids of the models that the gateway should serve.
        groups: gives the groups that this gateway reaches.
    """

    def __init__(
        self,
        counts: Callable[[], Mapping[str, ModelGroups]],
        models: Callable[[], Iterable[str]],
        groups: Callable[[], Iterable[GroupView]],
    ) -> None:
        self._model_groups = counts
        self._models = models
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        wanted = GaugeMetricFamily(
            "arriero_groups_wanted", "Desired number of groups.", labels=["model"]
        )
        serving = GaugeMetricFamily(
            "arriero_groups_serving", "Groups that serve, by the registry.", labels=["model"]
        )
        linked = GaugeMetricFamily(
            "arriero_groups_linked", "Groups that this gateway reaches.", labels=["model"]
        )
        starts = CounterMetricFamily(
            "arriero_group_starts", "Groups that started, restarts included.", labels=["model"]
        )
        start_s = GaugeMetricFamily(
            "arriero_group_start_seconds",
            "Seconds from placed slices to the group's first token.",
            labels=["model", "group"],
        )
        for model, counts in self._model_groups().items():
            wanted.add_metric([model], counts.wanted)
            serving.add_metric([model], len(counts.start_s))
            starts.add_metric([model], counts.starts)
            for group_id, seconds in counts.start_s.items():
                start_s.add_metric([model, group_id], seconds)
        reached = [view.model for view in self._groups()]
        for model in sorted({*self._models(), *reached}):
            linked.add_metric([model], reached.count(model))
        yield from (wanted, serving, linked, starts, start_s)

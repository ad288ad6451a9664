"""Metrics of speculative decoding: what was drafted, and what of it was right.

Knows the statistics of groups; knows nothing of how tokens are drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from arriero.router.backend import GroupView


class DraftMetrics(Collector):
    """Drafts of the groups, as last reported by the leaders; none for groups without drafts.

    Args:
        groups: gives the connected groups; called at each export.
    """

    def __init__(self, groups: Callable[[], Iterable[GroupView]]) -> None:
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        labels = ["model", "group"]
        rows = CounterMetricFamily(
            "arriero_group_drafts", "Rows of steps with drafted tokens.", labels=labels
        )
        drafted = CounterMetricFamily(
            "arriero_group_drafted_tokens",
            "Drafted tokens of speculative decoding: accepted, and rejected.",
            labels=[*labels, "outcome"],
        )
        accepted = CounterMetricFamily(
            "arriero_group_accepted_tokens",
            "Accepted drafted tokens by their place in the draft, from 1.",
            labels=[*labels, "position"],
        )
        for view in self._groups():
            group, drafts = [view.model, view.group_id], view.stats.speculation
            if not drafts.drafts:
                continue
            rows.add_metric(group, drafts.drafts)
            drafted.add_metric([*group, "accepted"], drafts.accepted)
            drafted.add_metric([*group, "rejected"], drafts.drafted - drafts.accepted)
            for position, count in enumerate(drafts.by_position, 1):
                accepted.add_metric([*group, str(position)], count)
        yield from (rows, drafted, accepted)

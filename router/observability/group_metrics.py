"""Metrics of queues, KV tiers and groups, read at each export.

Knows names and numbers; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.router.backend import GroupView

_COUNTERS = {
    "steps": ("arriero_group_steps", "Steps of the group's engine."),
    "preemptions": ("arriero_group_preemptions", "Sequences preempted to free their KV blocks."),
    "expert_moves": (
        "arriero_group_expert_moves",
        "Changed expert placements, per layer.",
    ),
}


class WaitingFamilies(Collector):
    """The queues of the gateway."""

    def __init__(self, waiting: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        family = GaugeMetricFamily(
            "arriero_gateway_requests_waiting",
            "Requests that wait in this gateway.",
            labels=["model", "tenant"],
        )
        for labels, waiting in self._waiting().items():
            family.add_metric(labels, waiting)
        yield family


class TierFamilies(Collector):
    """The KV caches below the device, as last reported by the leaders."""

    def __init__(self, groups: Callable[[], Iterable[GroupView]]) -> None:
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        labels = ["model", "group"]
        blocks = GaugeMetricFamily(
            "arriero_kv_tier_blocks",
            "KV blocks of the group in host memory, on disk and in shared storage.",
            labels=[*labels, "tier"],
        )
        copies = CounterMetricFamily(
            "arriero_kv_tier_copies",
            "Copied KV blocks by kind: loaded to the device, saved from the device, failed.",
            labels=[*labels, "kind"],
        )
        for view in self._groups():
            for name, count in view.stats.tiers.items():
                if name in ("host", "disk", "shared"):
                    blocks.add_metric([view.model, view.group_id, name], count)
                elif name != "moving":
                    copies.add_metric([view.model, view.group_id, name], count)
        yield from (blocks, copies)


class GroupFamilies(Collector):
    """The statistics of the groups, as last reported by the leaders."""

    def __init__(self, groups: Callable[[], Iterable[GroupView]]) -> None:
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        labels = ["model", "group"]
        waiting = GaugeMetricFamily(
            "arriero_requests_waiting", "Sequences that wait in the group.", labels=labels
        )
        running = GaugeMetricFamily(
            "arriero_requests_running", "Sequences that run in the group.", labels=labels
        )
        blocks = GaugeMetricFamily(
            "arriero_kv_blocks",
            "KV blocks of the group: used, cached (free, with a reusable prefix), total.",
            labels=[*labels, "state"],
        )
        steps = GaugeMetricFamily(
            "arriero_group_step_seconds",
            "Mean duration of a step's phases over the last steps.",
            labels=[*labels, "phase"],
        )
        imbalance = GaugeMetricFamily(
            "arriero_group_expert_imbalance",
            "Largest number of expert tokens of a slice, divided by the mean; 1 is balanced.",
            labels=labels,
        )
        experts = CounterMetricFamily(
            "arriero_group_expert_tokens",
            "Tokens routed to each expert.",
            labels=[*labels, "layer", "expert"],
        )
        counters = {
            field: CounterMetricFamily(name, help_text, labels=labels)
            for field, (name, help_text) in _COUNTERS.items()
        }
        for view in self._groups():
            group = [view.model, view.group_id]
            waiting.add_metric(group, view.load.num_waiting)
            running.add_metric(group, view.load.num_running)
            stats = view.stats
            blocks.add_metric([*group, "used"], stats.blocks_used)
            blocks.add_metric([*group, "cached"], stats.blocks_cached)
            blocks.add_metric([*group, "total"], stats.blocks_total)
            for phase, duration_us in stats.step_us.items():
                steps.add_metric([*group, phase], duration_us / 1e6)
            for field, counter in counters.items():
                counter.add_metric(group, getattr(stats, field))
            if stats.expert_loads:
                imbalance.add_metric(group, stats.expert_imbalance)
                for layer, tokens in stats.expert_loads.items():
                    for expert, count in enumerate(tokens):
                        experts.add_metric([*group, layer, str(expert)], count)
        yield from (waiting, running, blocks, steps, imbalance, experts, *counters.values())

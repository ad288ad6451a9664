"""The metrics that Kubernetes' inference gateways read, under the names of vLLM.

A gateway counts as one model server: numbers are sums over its groups of a model, and waiting
requests count those in the gateway too. Knows views of groups and names; knows nothing of the
server that exports the metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.router.backend import GroupView

_LABELS = ("model_name", "engine")
_ENGINE = "0"
"""A gateway is one engine to its readers."""
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of admitted requests.",
    "generation_tokens": "Output tokens.",
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had.",
    "num_preemptions": "Sequences preempted to free their KV blocks.",
}


class GatewayApiFamilies(Collector):
    """The numbers of all models as metric families.

    Args:
        groups: gives the connected groups; called at each export.
        waiting: gives the number of waiting requests by model and tenant; called at each export.
    """

    def __init__(
        self,
        groups: Callable[[], Iterable[GroupView]],
        waiting: Callable[[], Mapping[tuple[str, str], int]],
    ) -> None:
        self._groups = groups
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        by_model: dict[str, list[GroupView]] = {}
        for view in self._groups():
            by_model.setdefault(view.model, []).append(view)
        queued: dict[str, int] = {}
        for (model, _), count in self._waiting().items():
            queued[model] = queued.get(model, 0) + count
        running = _gauge("num_requests_running", "Sequences that run in the groups.")
        waiting = _gauge("num_requests_waiting", "Requests that wait in gateway and groups.")
        usages = [
            _gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1."),
            _gauge("gpu_cache_usage_perc", "The same under its older name."),
        ]
        config = _gauge(
            "cache_config_info", "Sizes of the KV cache.", "block_size", "num_gpu_blocks"
        )
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Slots, adapters of running and of waiting requests. The value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        counters = {
            name: CounterMetricFamily(f"vllm:{name}", text, labels=list(_LABELS))
            for name, text in _COUNTERS.items()
        }
        for model in sorted({*by_model, *queued}):
            labels, views = [model, _ENGINE], by_model.get(model, [])
            running.add_metric(labels, sum(view.load.num_running for view in views))
            in_groups = sum(view.load.num_waiting for view in views)
            waiting.add_metric(labels, queued.get(model, 0) + in_groups)
            total = sum(view.stats.blocks_total for view in views)
            used = sum(view.stats.blocks_used for view in views)
            for usage in usages:
                usage.add_metric(labels, used / total if total else 0.0)
            sizes = {view.card.block_size for view in views if view.card.block_size}
            for size in sorted(sizes):
                config.add_metric([*labels, str(size), str(total)], 1)
            for name, count in _counts(views).items():
                counters[name].add_metric(labels, count)
        lora.add_metric(_lora_labels(chain.from_iterable(by_model.values())), time.time())
        yield from (running, waiting, *usages, config, lora, *counters.values())


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vllm:{name}", text, labels=[*_LABELS, *labels])


def _lora_labels(views: Iterable[GroupView]) -> list[str]:
    """Slots, and the names of the adapters of running and of waiting requests."""
    slots, running, waiting = 0, set[str](), set[str]()
    for view in views:
        adapters = view.stats.adapters
        slots += adapters.num_slots
        for adapter in view.card.adapters:
            if adapter.digest in adapters.running:
                running.add(adapter.name)
            if adapter.digest in adapters.waiting:
                waiting.add(adapter.name)
    return [str(slots), ",".join(sorted(running)), ",".join(sorted(waiting))]


def _counts(views: Iterable[GroupView]) -> dict[str, int]:
    engines = [view.stats for view in views]
    prompt = sum(engine.prompt_tokens for engine in engines)
    return {
        "prompt_tokens": prompt,
        "generation_tokens": sum(engine.output_tokens for engine in engines),
        "prefix_cache_queries": prompt,
        "prefix_cache_hits": sum(engine.cached_tokens for engine in engines),
        "num_preemptions": sum(engine.preemptions for engine in engines),
    }

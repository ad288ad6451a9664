"""What a gateway counts, for Prometheus, under names that stay.

Token counts, times and failures are of the requests that went through this gateway, so that sums
over gateways are right; what a group says of itself (`arriero_group_*`, queues, blocks) is the
same from each gateway, and carries the group's id. Knows names and numbers; knows nothing of how
they are served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arriero.router.backend import GroupView
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.engine.types import SequenceOutput
from arriero.shards.errors import ArrieroError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_COUNTERS = {
    "steps": ("arriero_group_steps", "Steps of the group's engine."),
    "preemptions": ("arriero_group_preemptions", "Sequences that gave their blocks up for others."),
}


class Metrics:
    """The counters of one gateway.

    Args:
        groups: gives the connected groups, asked at each export.
    """

    def __init__(self, groups: Callable[[], Iterable[GroupView]]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Groups(groups))
        self._models: dict[str, _Model] = {}
        self._prompt = Counter(
            "arriero_prompt_tokens", "Prompt tokens.", ["model"], registry=registry
        )
        self._generation = Counter(
            "arriero_generation_tokens", "Output tokens.", ["model"], registry=registry
        )
        self._cached = Counter(
            "arriero_prefix_cache_hit_tokens",
            "Prompt tokens found in the prefix cache.",
            ["model"],
            registry=registry,
        )
        self._finished = Counter(
            "arriero_requests", "Requests answered to the end.", ["model"], registry=registry
        )
        self._failures = Counter(
            "arriero_request_failures",
            "Requests that ended otherwise, by the error's name; `cancelled` by the client.",
            ["kind"],
            registry=registry,
        )
        self._moves = Counter(
            "arriero_stream_moves",
            "Times that a request went on in another group, its own being lost, full or draining.",
            ["model"],
            registry=registry,
        )
        self._first = Histogram(
            "arriero_time_to_first_token_seconds",
            "From a checked request to its first token.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._between = Histogram(
            "arriero_inter_token_latency_seconds",
            "Between two tokens of one sample.",
            ["model"],
            buckets=_BETWEEN_TOKENS_S,
            registry=registry,
        )

    def moved(self, model: str, times: int) -> None:
        """Count how often one request went on elsewhere; `model` must be one that is served."""
        self._moves.labels(model).inc(times)

    def export(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Count what ends the block other than well."""
        try:
            yield
        except ArrieroError as error:
            self._failures.labels(type(error).__name__).inc()
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self._failures.labels("cancelled").inc()
            raise
        except Exception:
            self._failures.labels("internal").inc()
            raise

    @contextmanager
    def request(self, model: str) -> Iterator[Watch]:
        """Watch one request; `model` must be one that is served."""
        labelled = self._models.get(model)
        if labelled is None:
            labelled = self._models[model] = _Model(
                self._prompt.labels(model),
                self._generation.labels(model),
                self._cached.labels(model),
                self._finished.labels(model),
                self._first.labels(model),
                self._between.labels(model),
            )
        watch = Watch(labelled)
        with self.failures():
            try:
                yield watch
            except GeneratorExit:
                if not watch.finished:  # else the client only left before the very end
                    raise


class Watch:
    """One request's times and tokens.

    Attributes:
        finished: its last message was made.
    """

    __slots__ = ("_begun_s", "_last_s", "_model", "finished")

    def __init__(self, model: _Model) -> None:
        self._model = model
        self._begun_s = time.monotonic()
        self._last_s: dict[int, float] = {}
        self.finished = False

    def step(self, outputs: Sequence[SequenceOutput]) -> None:
        """Count what a step gave."""
        now_s = time.monotonic()
        model = self._model
        for output in outputs:
            num_tokens = len(output.tokens)
            if not num_tokens:
                continue
            model.generation.inc(num_tokens)
            last_s = self._last_s.get(output.index)
            if last_s is not None:
                model.between.observe((now_s - last_s) / num_tokens)
            elif not self._last_s:
                model.first.observe(now_s - self._begun_s)
            self._last_s[output.index] = now_s

    def finish(self, usage: pb.Usage) -> None:
        """Count a whole answer."""
        self.finished = True
        self._model.prompt.inc(usage.prompt_tokens)
        self._model.cached.inc(usage.cached_tokens)
        self._model.requests.inc()


class _Model:
    """One model's counters, looked up once."""

    __slots__ = ("between", "cached", "first", "generation", "prompt", "requests")

    def __init__(
        self,
        prompt: Counter,
        generation: Counter,
        cached: Counter,
        requests: Counter,
        first: Histogram,
        between: Histogram,
    ) -> None:
        self.prompt = prompt
        self.generation = generation
        self.cached = cached
        self.requests = requests
        self.first = first
        self.between = between


class _Groups(Collector):
    """What the leaders last said of themselves."""

    def __init__(self, groups: Callable[[], Iterable[GroupView]]) -> None:
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """Read at each export."""
        labels = ["model", "group"]
        waiting = GaugeMetricFamily(
            "arriero_requests_waiting", "Sequences that wait in the group.", labels=labels
        )
        running = GaugeMetricFamily(
            "arriero_requests_running", "Sequences that run in the group.", labels=labels
        )
        blocks = GaugeMetricFamily(
            "arriero_kv_blocks",
            "KV blocks of the group: used, cached (free, but a prefix is in them), total.",
            labels=[*labels, "state"],
        )
        steps = GaugeMetricFamily(
            "arriero_group_step_seconds",
            "Duration of a step's phases, lately.",
            labels=[*labels, "phase"],
        )
        counters = {
            field: CounterMetricFamily(name, words, labels=labels)
            for field, (name, words) in _COUNTERS.items()
        }
        for view in self._groups():
            group = [view.model, view.group_id]
            waiting.add_metric(group, view.load.num_waiting)
            running.add_metric(group, view.load.num_running)
            for state in ("used", "cached", "total"):
                blocks.add_metric([*group, state], view.stats.get(f"blocks_{state}", 0))
            for phase, duration_us in view.stats.get("step_us", {}).items():
                steps.add_metric([*group, phase], duration_us / 1e6)
            for field, counter in counters.items():
                counter.add_metric(group, view.stats.get(field, 0))
        yield from (waiting, running, blocks, steps, *counters.values())

"""What a gateway counts, for Prometheus, under names that stay.

Token counts, times and failures are of the requests that went through this gateway, so that sums
over gateways are right; what a group says of itself (`arriero_group_*`, queues, blocks) is the
same from each gateway, and carries the group's id. Knows names and numbers; knows nothing of how
they are served.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
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
    "expert_moves": ("arriero_group_expert_moves", "Experts' placements changed, layer by layer."),
}


class Metrics:
    """The counters of one gateway.

    Args:
        groups: gives the connected groups, asked at each export.
        waiting: gives the requests that wait in the gateway, by model and tenant.
    """

    def __init__(
        self,
        groups: Callable[[], Iterable[GroupView]],
        waiting: Callable[[], Mapping[tuple[str, str], int]] = dict,
    ) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Groups(groups))
        registry.register(_Tiers(groups))
        registry.register(_Waiting(waiting))
        self._labelled: dict[tuple[str, str], _Labelled] = {}
        self._prompt = Counter(
            "arriero_prompt_tokens", "Prompt tokens.", ["model"], registry=registry
        )
        self._tokens: dict[str, _Tokens] = {}
        registry.register(_TokenFamilies(self._tokens))
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
            "From a checked request to its first token, its wait in the gateway included.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._queue = Histogram(
            "arriero_queue_seconds",
            "From a checked request to its turn: its wait in the gateway.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._tenant = Counter(
            "arriero_tenant_tokens",
            "Tokens of a tenant's requests that ended; kind is prompt or output.",
            ["tenant", "kind"],
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
    def request(self, model: str, tenant: str) -> Iterator[RequestTimer]:
        """Watch one request; `model` must be one that is served, `tenant` one that has a key."""
        labelled = self._labelled.get((model, tenant))
        if labelled is None:
            labelled = self._labelled[model, tenant] = _Labelled(
                prompt=(self._prompt.labels(model), self._tenant.labels(tenant, "prompt")),
                tokens=self._tokens.setdefault(model, _Tokens()),
                tenant_output=self._tenant.labels(tenant, "output"),
                cached=self._cached.labels(model),
                requests=self._finished.labels(model),
                queue=self._queue.labels(model),
                first=self._first.labels(model),
            )
        watch = RequestTimer(labelled)
        with self.failures():
            try:
                yield watch
            except GeneratorExit:
                if not watch.finished:  # else the client only left before the very end
                    raise
            finally:
                labelled.tenant_output.inc(watch.num_tokens)


class RequestTimer:
    """One request's times and tokens.

    Attributes:
        finished: its last message was made.
        begun_s, turn_s, first_s: when it came, when its turn came, and when its first token did, on
            the monotonic clock; None for what has not been.
        num_tokens: output tokens so far.
    """

    __slots__ = ("_labelled", "_last_s", "begun_s", "finished", "first_s", "num_tokens", "turn_s")

    def __init__(self, labelled: _Labelled) -> None:
        self._labelled = labelled
        self.begun_s = time.monotonic()
        self.turn_s: float | None = None
        self.first_s: float | None = None
        self._last_s: dict[int, float] = {}
        self.num_tokens = 0
        self.finished = False

    def turn(self) -> None:
        """Its turn has come."""
        self.turn_s = time.monotonic()
        self._labelled.queue.observe(self.turn_s - self.begun_s)

    def step(self, outputs: Sequence[SequenceOutput]) -> tuple[int, float]:
        """Count what a step gave; gives its tokens, and the time."""
        now_s = time.monotonic()
        labelled, tokens, total = self._labelled, self._labelled.tokens, 0
        for output in outputs:
            num_tokens = len(output.tokens)
            if not num_tokens:
                continue
            total += num_tokens
            last_s = self._last_s.get(output.index)
            if last_s is not None:
                tokens.observe((now_s - last_s) / num_tokens)
            elif self.first_s is None:
                self.first_s = now_s
                labelled.first.observe(now_s - self.begun_s)
            self._last_s[output.index] = now_s
        tokens.count += total
        self.num_tokens += total
        return total, now_s

    def finish(self, usage: pb.Usage) -> None:
        """Count a whole answer."""
        self.finished = True
        for counter in self._labelled.prompt:
            counter.inc(usage.prompt_tokens)
        self._labelled.cached.inc(usage.cached_tokens)
        self._labelled.requests.inc()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Labelled:
    """The counters of one model and tenant, looked up once."""

    prompt: tuple[Counter, Counter]
    tokens: _Tokens
    tenant_output: Counter
    cached: Counter
    requests: Counter
    queue: Histogram
    first: Histogram


class _Tokens:
    """Output tokens of one model, and the times between them: plain numbers, added to each token.

    The library's own counters take a lock and write several values for each; these are read out
    where metrics are exported, on the event loop that counts.
    """

    __slots__ = ("between", "between_s", "count")

    def __init__(self) -> None:
        self.count = 0
        self.between = [0] * (len(_BETWEEN_TOKENS_S) + 1)
        self.between_s = 0.0

    def observe(self, elapsed_s: float) -> None:
        """A token came so long after the one before it."""
        self.between[bisect_left(_BETWEEN_TOKENS_S, elapsed_s)] += 1
        self.between_s += elapsed_s


class _TokenFamilies(Collector):
    """The tokens of all models, as Prometheus has them."""

    def __init__(self, tokens: Mapping[str, _Tokens]) -> None:
        self._tokens = tokens

    def collect(self) -> Iterator[Metric]:
        """Read at each export."""
        count = CounterMetricFamily("arriero_generation_tokens", "Output tokens.", labels=["model"])
        between = HistogramMetricFamily(
            "arriero_inter_token_latency_seconds",
            "Between two tokens of one sample.",
            labels=["model"],
        )
        bounds = [*map(str, map(float, _BETWEEN_TOKENS_S)), "+Inf"]
        for model, tokens in self._tokens.items():
            count.add_metric([model], tokens.count)
            rising = list(zip(bounds, accumulate(tokens.between), strict=True))
            between.add_metric([model], rising, tokens.between_s)
        yield count
        yield between


class _Waiting(Collector):
    """The gateway's own queues."""

    def __init__(self, waiting: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._waiting = waiting

    def collect(self) -> Iterator[Metric]:
        """Read at each export."""
        family = GaugeMetricFamily(
            "arriero_gateway_requests_waiting",
            "Requests that wait for their turn in this gateway.",
            labels=["model", "tenant"],
        )
        for labels, waiting in self._waiting().items():
            family.add_metric(labels, waiting)
        yield family


class _Tiers(Collector):
    """What the leaders last said of their KV caches below the device."""

    def __init__(self, groups: Callable[[], Iterable[GroupView]]) -> None:
        self._groups = groups

    def collect(self) -> Iterator[Metric]:
        """Read at each export."""
        labels = ["model", "group"]
        blocks = GaugeMetricFamily(
            "arriero_kv_tier_blocks",
            "KV blocks of the group below the device.",
            labels=[*labels, "tier"],
        )
        copies = CounterMetricFamily(
            "arriero_kv_tier_copies",
            "Copies of KV blocks: loaded to the device, saved below it, failed.",
            labels=[*labels, "kind"],
        )
        for view in self._groups():
            found = view.stats.get("tiers", {})
            for name, count in found.items():
                if name in ("host", "disk", "shared"):
                    blocks.add_metric([view.model, view.group_id, name], count)
                elif name != "moving":
                    copies.add_metric([view.model, view.group_id, name], count)
        yield from (blocks, copies)


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
        imbalance = GaugeMetricFamily(
            "arriero_group_expert_imbalance",
            "Tokens of the slice whose experts got most, over the mean; 1 is even.",
            labels=labels,
        )
        experts = CounterMetricFamily(
            "arriero_group_expert_tokens",
            "Tokens that each expert was sent.",
            labels=[*labels, "layer", "expert"],
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
            if loads := view.stats.get("expert_loads"):
                imbalance.add_metric(group, view.stats["expert_imbalance"])
                for layer, tokens in loads.items():
                    for expert, count in enumerate(tokens):
                        experts.add_metric([*group, layer, str(expert)], count)
        yield from (waiting, running, blocks, steps, imbalance, experts, *counters.values())

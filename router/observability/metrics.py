"""The Prometheus metrics of a gateway, under stable names.

Token counts, times and failures concern the requests of this gateway, so that sums over gateways
are right. Metrics that a group reports (`arriero_group_*`, queues, blocks) are the same in each
gateway and have the group's id as a label. Knows names and numbers; knows nothing of the server
that exports the metrics.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from arriero.router.backend import GroupView
from arriero.router.observability.draft_metrics import DraftMetrics
from arriero.router.observability.gateway_api_metrics import GatewayApiFamilies
from arriero.router.observability.group_metrics import (
    GroupFamilies,
    TierFamilies,
    WaitingFamilies,
)
from arriero.router.observability.guard_metrics import GuardMetrics
from arriero.router.observability.model_groups import ModelGroupFamilies, ModelGroups
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.shards.engine.types import SequenceOutput
from arriero.shards.errors import ArrieroError

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of a gateway.

    Args:
        groups: gives the connected groups; called at each export.
        waiting: gives the number of waiting requests by model and tenant; called at each export.
        models: gives the ids of the models that the gateway should serve; called at each export.
        counts: gives the groups of each model in numbers; called at each export.

    Attributes:
        guards: counts judgements.
    """

    def __init__(
        self,
        groups: Callable[[], Iterable[GroupView]],
        waiting: Callable[[], Mapping[tuple[str, str], int]] = dict,
        models: Callable[[], Iterable[str]] = tuple,
        counts: Callable[[], Mapping[str, ModelGroups]] = dict,
    ) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(GroupFamilies(groups))
        registry.register(ModelGroupFamilies(counts, models, groups))
        registry.register(TierFamilies(groups))
        registry.register(DraftMetrics(groups))
        registry.register(WaitingFamilies(waiting))
        registry.register(GatewayApiFamilies(groups, waiting))
        self.guards = GuardMetrics(registry)
        self._labelled: dict[tuple[str, str], _Labelled] = {}
        self._prompt = Counter(
            "arriero_prompt_tokens", "Prompt tokens.", ["model"], registry=registry
        )
        self._tokens: dict[str, _Tokens] = {}
        registry.register(_TokenFamilies(self._tokens))
        self._cached = Counter(
            "arriero_prefix_cache_hit_tokens",
            "Prompt tokens that came from the prefix cache.",
            ["model"],
            registry=registry,
        )
        self._finished = Counter(
            "arriero_requests", "Requests that finished.", ["model"], registry=registry
        )
        self._failures = Counter(
            "arriero_request_failures",
            "Requests that failed, by name of the error; `cancelled`: the client cancelled.",
            ["kind"],
            registry=registry,
        )
        self._migrations = Counter(
            "arriero_stream_moves",
            "Migrations of requests to another group, after the group was lost, full or draining.",
            ["model"],
            registry=registry,
        )
        self._first_token = Histogram(
            "arriero_time_to_first_token_seconds",
            "Seconds from a valid request to the first token, including the wait in the gateway.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._queue = Histogram(
            "arriero_queue_seconds",
            "Seconds that a valid request waits in the gateway before a group gets it.",
            ["model"],
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._tenant = Counter(
            "arriero_tenant_tokens",
            "Tokens of a tenant's ended requests; kind is `prompt` or `output`.",
            ["tenant", "kind"],
            registry=registry,
        )

    def migrated(self, model: str, count: int) -> None:
        """Add the migrations of a request; `model` must be a served model."""
        self._migrations.labels(model).inc(count)

    def collect(self) -> Iterable[Metric]:
        """All metrics as families."""
        return self._registry.collect()

    def export(self) -> bytes:
        """All metrics in the Prometheus text format."""
        return generate_latest(self._registry)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Count exceptions that leave the block."""
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
        """Time a request; `model` must be a served model, `tenant` a known tenant."""
        labelled = self._labelled.get((model, tenant))
        if labelled is None:
            labelled = self._labelled[model, tenant] = _Labelled(
                prompt=(self._prompt.labels(model), self._tenant.labels(tenant, "prompt")),
                tokens=self._tokens.setdefault(model, _Tokens()),
                tenant_output=self._tenant.labels(tenant, "output"),
                cached=self._cached.labels(model),
                requests=self._finished.labels(model),
                queue=self._queue.labels(model),
                first_token=self._first_token.labels(model),
            )
        timer = RequestTimer(labelled)
        with self.failures():
            try:
                yield timer
            except GeneratorExit:
                if not timer.finished:  # a client may leave after the last message
                    raise
            finally:
                labelled.tenant_output.inc(timer.num_tokens)


class RequestTimer:
    """Times and tokens of a request; times are monotonic.

    Attributes:
        start_s: time of arrival.
        admitted_s: time of the end of the wait in the gateway; None before.
        first_token_s: time of the first token; None before.
        num_tokens: output tokens so far.
        finished: the last message is complete.
    """

    __slots__ = (
        "_labelled",
        "_last_s",
        "admitted_s",
        "finished",
        "first_token_s",
        "num_tokens",
        "start_s",
    )

    def __init__(self, labelled: _Labelled) -> None:
        self._labelled = labelled
        self.start_s = time.monotonic()
        self.admitted_s: float | None = None
        self.first_token_s: float | None = None
        self._last_s: dict[int, float] = {}
        self.num_tokens = 0
        self.finished = False

    def admitted(self) -> None:
        """Record the end of the wait in the gateway."""
        self.admitted_s = time.monotonic()
        self._labelled.queue.observe(self.admitted_s - self.start_s)

    def since_start_ms(self) -> float:
        """Milliseconds since the arrival."""
        return (time.monotonic() - self.start_s) * 1e3

    def step(self, outputs: Sequence[SequenceOutput]) -> tuple[int, float]:
        """Count the outputs of a step; gives the number of tokens and the time."""
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
            elif self.first_token_s is None:
                self.first_token_s = now_s
                labelled.first_token.observe(now_s - self.start_s)
                log.debug("first token after %.1f ms", (now_s - self.start_s) * 1e3)
            self._last_s[output.index] = now_s
        tokens.count += total
        self.num_tokens += total
        return total, now_s

    def finish(self, usage: pb.Usage) -> None:
        """Count a finished request."""
        self.finished = True
        for counter in self._labelled.prompt:
            counter.inc(usage.prompt_tokens)
        self._labelled.cached.inc(usage.cached_tokens)
        self._labelled.requests.inc()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Labelled:
    """The metrics with the labels of a model and tenant, looked up once."""

    prompt: tuple[Counter, Counter]
    tokens: _Tokens
    tenant_output: Counter
    cached: Counter
    requests: Counter
    queue: Histogram
    first_token: Histogram


class _Tokens:
    """Output tokens of a model and the times between tokens, as plain numbers.

    A counter of the Prometheus library takes a lock and writes several values for each token; plain
    numbers cost less and are read at each export, on the event loop that counts.
    """

    __slots__ = ("between", "between_s", "count")

    def __init__(self) -> None:
        self.count = 0
        self.between = [0] * (len(_BETWEEN_TOKENS_S) + 1)
        self.between_s = 0.0

    def observe(self, elapsed_s: float) -> None:
        """Count a token that came `elapsed_s` seconds after the previous token."""
        self.between[bisect_left(_BETWEEN_TOKENS_S, elapsed_s)] += 1
        self.between_s += elapsed_s


class _TokenFamilies(Collector):
    """The tokens of all models as metric families."""

    def __init__(self, tokens: Mapping[str, _Tokens]) -> None:
        self._tokens = tokens

    def collect(self) -> Iterator[Metric]:
        """The metric families at an export."""
        count = CounterMetricFamily("arriero_generation_tokens", "Output tokens.", labels=["model"])
        between = HistogramMetricFamily(
            "arriero_inter_token_latency_seconds",
            "Seconds between two tokens of a sample.",
            labels=["model"],
        )
        bounds = [*map(str, map(float, _BETWEEN_TOKENS_S)), "+Inf"]
        for model, tokens in self._tokens.items():
            count.add_metric([model], tokens.count)
            buckets = list(zip(bounds, accumulate(tokens.between), strict=True))
            between.add_metric([model], buckets, tokens.between_s)
        yield count
        yield between

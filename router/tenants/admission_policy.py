"""Admission policy of one model at one gateway, sans-I/O: requests start, wait or are refused.

A new request is checked against the tenant's rates, the room in the queue and the expected wait.
A request that cannot be served is refused at once, with the seconds after which to retry. Other
requests wait in a `FairQueue` and start when the model's groups have room. A full queue refuses
the last request of the tenant with the most waiting work, so a tenant that floods the gateway
loses its own requests, not the requests of others.

Knows tenants, costs and times that are passed in; knows nothing of sockets, tasks or groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.router.tenants.background import BackgroundPace
from arriero.router.tenants.bucket import Bucket
from arriero.router.tenants.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.config.priorities import BACKGROUND_PRIORITY
from arriero.shards.errors import Overloaded

FIRST_GUESS_OUTPUT = 128
"""Expected output tokens of a sample while no sample has ended yet."""
_MEAN_WEIGHT = 0.2
"""Weight of the latest request in the tenant's mean; a new tenant starts with the global mean."""
_SERVED_HALF_LIFE_S = 5.0
_RATE_KNOWN_S = 0.5
"""Seconds of measured service before waits are estimated from the service rate."""


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request that asks for admission.

    Attributes:
        tenant: tenant of the caller.
        num_prompt: number of prompt tokens.
        max_output: most output tokens, of all samples together.
        num_sequences: number of samples.
        priority: among the tenant's requests; lower goes first.
        deadline_s: monotonic time at which the caller gives up; None for never.
        cost: expected cost, prompt and output.
        arrived_s: monotonic time of arrival.
        num_output: output tokens so far.
        pending_cost: cost of the output that is still expected.
        started: the request was admitted.
        refusal: reason for a refusal while the request waited.
        ended: the request has ended.
        last_output_s: monotonic time of the latest output; None before the first.
    """

    tenant: Tenant
    num_prompt: int
    max_output: int
    num_sequences: int = 1
    priority: int = 0
    deadline_s: float | None = None
    cost: float = 0.0
    arrived_s: float = 0.0
    num_output: int = 0
    pending_cost: float = 0.0
    started: bool = False
    refusal: Overloaded | None = None
    ended: bool = False
    last_output_s: float | None = None


@dataclass(slots=True)
class _Usage:
    """Current use of a tenant, and mean output tokens of a sample in its latest requests."""

    mean_output: float
    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None


class AdmissionPolicy:
    """Admission of requests to one model.

    `enqueue` a request; call `start_next` after every call that may free room, to get the requests
    to start; `count_output` their tokens; `release` each request at its end, whatever the reason.

    Args:
        limits: of the queue.

    Attributes:
        limits: of the queue; may be replaced at any time. The limits of a tenant count from its
            next request on.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._usage: dict[str, _Usage] = {}
        self._served = _Rate()
        self._sequences = 0
        self._mean_output = float(FIRST_GUESS_OUTPUT)
        self._pace = BackgroundPace()

    @property
    def num_waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._queue)

    @property
    def num_waiting_interactive(self) -> int:
        """Number of waiting requests that are not in background."""
        return self._queue.num_before_priority(BACKGROUND_PRIORITY)

    @property
    def num_sequences(self) -> int:
        """Number of samples of running requests."""
        return self._sequences

    @property
    def backlog_s(self) -> float:
        """Seconds to serve all waiting requests at the recent rate; 0 while the rate is unknown.

        Background requests do not count.
        """
        return self._wait_s(self._queue.cost_before_priority(BACKGROUND_PRIORITY))

    def waiting_by_tenant(self) -> dict[str, int]:
        """Number of waiting requests of each tenant ever seen."""
        return dict(self._queue.sizes())

    def enqueue(self, request: QueuedRequest, now_s: float) -> QueuedRequest | None:
        """Add a request to the queue.

        Returns:
            The request that was pushed out of the full queue, if any.

        Raises:
            Overloaded: the request is refused; the error holds the reason and the retry time.
        """
        tenant, limits = request.tenant, self.limits
        usage = self._usage_of(tenant, now_s)
        output = _expected_output(request, usage)
        request.cost = PROMPT_COST * request.num_prompt + OUTPUT_COST * output
        self._check(tenant, request.num_prompt, request.cost, request.deadline_s, now_s)
        request.arrived_s = now_s
        self._queue.push(tenant, request, cost=request.cost, priority=request.priority)
        if not tenant.background:
            self._pace.arrived(now_s)
        if usage.requests is not None:
            usage.requests.take(1, now_s)
        if usage.tokens is not None:
            usage.tokens.take(request.num_prompt, now_s)
        if len(self._queue) <= limits.max_queued:
            return None
        pushed_out = self._queue.push_out()
        pushed_out.refusal = self._full(pushed_out.tenant, pushed_out.cost)
        self._give_back(pushed_out, now_s)
        if pushed_out is request:
            self._note_end(request, now_s)
            raise pushed_out.refusal
        return pushed_out

    def refuse_early(
        self, tenant: Tenant, priority: int, deadline_s: float | None, now_s: float
    ) -> None:
        """Refuse a request before work is spent on it, if `enqueue` would refuse the shortest one.

        Args:
            tenant: tenant of the caller.
            priority: among the tenant's requests.
            deadline_s: monotonic time at which the caller gives up; None for never.
            now_s: monotonic time.

        Raises:
            Overloaded: as `enqueue`.
        """
        least = PROMPT_COST + OUTPUT_COST
        self._check(tenant, 1, least, deadline_s, now_s)
        full = len(self._queue) >= self.limits.max_queued
        if full and self._queue.would_push_out(tenant, priority):
            raise self._full(tenant, least)

    def start_next(self, room: int, now_s: float, num_groups: int = 1) -> list[QueuedRequest]:
        """Take the requests that start now out of the queue.

        Args:
            room: samples that the model's groups take from this gateway at once, running samples
                included. A request with more samples than that starts alone.
            now_s: monotonic time.
            num_groups: groups of the model.
        """

        def may_go(name: str, request: QueuedRequest) -> bool:
            if request.tenant.background:
                return self._pace.may_start(room, num_groups, now_s)
            most = request.tenant.max_running
            return most is None or self._usage[name].running < most

        started = []
        while len(self._queue) and self._sequences < room:
            request = self._queue.pop(may_go)
            if request is None:
                break
            request.started = True
            usage = self._usage[request.tenant.name]
            usage.running += 1
            self._sequences += request.num_sequences
            self._pace.started(request.num_sequences, background=request.tenant.background)
            self._charge(request, PROMPT_COST * request.num_prompt, now_s)
            self._expect(request, OUTPUT_COST * _expected_output(request, usage))
            started.append(request)
        return started

    def count_output(self, request: QueuedRequest, num_tokens: int, now_s: float) -> None:
        """Count output tokens of a running request."""
        cost = OUTPUT_COST * num_tokens
        request.num_output += num_tokens
        if request.last_output_s is None:
            self._pace.first_token(background=request.tenant.background)
        else:
            self._pace.next_token(now_s - request.last_output_s)
        request.last_output_s = now_s
        self._charge(request, cost, now_s)
        self._expect(request, max(0.0, request.pending_cost - cost))
        tokens = self._usage[request.tenant.name].tokens
        if tokens is not None:
            tokens.take(num_tokens, now_s)

    def release(self, request: QueuedRequest, now_s: float) -> None:
        """Free the room of a request that ended, whatever the reason; safe to call twice."""
        if request.ended:
            return
        request.ended = True
        self._note_end(request, now_s)
        if request.started:
            usage = self._usage[request.tenant.name]
            usage.running -= 1
            self._sequences -= request.num_sequences
            if not self._sequences and not len(self._queue):
                self._served.pause(now_s)
            self._expect(request, 0.0)
            output = request.num_output / request.num_sequences
            usage.mean_output += _MEAN_WEIGHT * (output - usage.mean_output)
            self._mean_output += _MEAN_WEIGHT / 4 * (output - self._mean_output)
        elif request.refusal is None:
            self._queue.remove(request.tenant.name, request)
            self._give_back(request, now_s)

    def timeout_error(self, request: QueuedRequest, now_s: float) -> Overloaded:
        """The error for a request that has waited for the longest time allowed."""
        return Overloaded(
            f"the request waited {now_s - request.arrived_s:.1f} s, the longest wait allowed, and "
            "did not start; retry later",
            self._wait_s(self._queue.cost_before(request.tenant)),
        )

    def _note_end(self, request: QueuedRequest, now_s: float) -> None:
        self._pace.ended(
            request.num_sequences,
            now_s,
            background=request.tenant.background,
            started=request.started,
            prompting=request.last_output_s is None,
        )

    def _usage_of(self, tenant: Tenant, now_s: float) -> _Usage:
        usage = self._usage.get(tenant.name)
        if usage is None:
            usage = self._usage[tenant.name] = _Usage(mean_output=self._mean_output)
        usage.requests = _bucket(usage.requests, tenant.requests_per_minute, now_s)
        usage.tokens = _bucket(usage.tokens, tenant.tokens_per_minute, now_s)
        return usage

    def _check(
        self,
        tenant: Tenant,
        num_prompt: int,
        cost: float,
        deadline_s: float | None,
        now_s: float,
    ) -> None:
        """Raise `Overloaded` if a limit forbids the request to enter the queue."""
        usage = self._usage_of(tenant, now_s)
        for name, bucket, amount, limit in (
            ("requests_per_minute", usage.requests, 1, tenant.requests_per_minute),
            ("tokens_per_minute", usage.tokens, num_prompt, tenant.tokens_per_minute),
        ):
            if bucket is not None and (wait_s := bucket.wait_s(amount, now_s)):
                raise Overloaded(
                    f"tenant {tenant.name!r} has used up `{name}`={limit:g}; "
                    f"retry in {wait_s:.1f} s",
                    wait_s,
                )
        if tenant.max_queued is not None and self._queue.waiting(tenant.name) >= tenant.max_queued:
            raise Overloaded(
                f"tenant {tenant.name!r} has {tenant.max_queued} waiting requests, the limit "
                "`max_queued`; send fewer at once",
                self._wait_s(cost),
            )
        if tenant.background or not len(self._queue):
            return  # the request may wait for room, but not for other requests
        wait_s = self._wait_s(self._queue.cost_before(tenant))
        if wait_s > self.limits.max_wait_s:
            raise Overloaded(
                f"the request would wait about {wait_s:.0f} s for others; `max_wait_s` is "
                f"{self.limits.max_wait_s:g} s; retry later",
                wait_s - self.limits.max_wait_s,
            )
        if deadline_s is not None and now_s + wait_s > deadline_s:
            raise Overloaded(
                f"the request would wait about {wait_s:.1f} s for others, but its deadline is in "
                f"{max(0.0, deadline_s - now_s):.1f} s; set a later deadline, or retry later",
                wait_s,
            )

    def _full(self, tenant: Tenant, cost: float) -> Overloaded:
        return Overloaded(
            f"{self.limits.max_queued} requests wait, the limit `max_queued`, and tenant "
            f"{tenant.name!r} has the most waiting work; send fewer at once",
            self._wait_s(cost),
        )

    def _wait_s(self, cost: float) -> float:
        return cost / rate if (rate := self._served.per_s()) else 0.0

    def _expect(self, request: QueuedRequest, cost: float) -> None:
        self._queue.expect(request.tenant, cost - request.pending_cost)
        request.pending_cost = cost

    def _charge(self, request: QueuedRequest, cost: float, now_s: float) -> None:
        self._queue.charge(request.tenant, cost)
        self._served.add(cost, now_s)

    def _give_back(self, request: QueuedRequest, now_s: float) -> None:
        usage = self._usage[request.tenant.name]
        if usage.tokens is not None:
            usage.tokens.take(-request.num_prompt, now_s)


def _bucket(bucket: Bucket | None, per_minute: float | None, now_s: float) -> Bucket | None:
    """The bucket with the current value of its limit."""
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now_s)
    bucket.change(per_minute, now_s)
    return bucket


def _expected_output(request: QueuedRequest, usage: _Usage) -> float:
    """Expected output tokens of a request, from the tenant's latest requests."""
    return min(float(request.max_output), usage.mean_output * request.num_sequences)


@dataclass(slots=True)
class _Rate:
    """Cost served per second of work; older seconds count less."""

    amount: float = 0.0
    elapsed_s: float = 0.0
    at_s: float | None = field(default=None)

    def add(self, amount: float, now_s: float) -> None:
        if self.at_s is None:
            self.at_s = now_s
        elapsed_s = now_s - self.at_s
        if elapsed_s > 0.05:  # not for each token
            keep = 0.5 ** (elapsed_s / _SERVED_HALF_LIFE_S)
            self.amount *= keep
            self.elapsed_s = self.elapsed_s * keep + elapsed_s
            self.at_s = now_s
        self.amount += amount

    def pause(self, now_s: float) -> None:
        """Do not count the time until the next `add`; nothing is left to serve."""
        self.add(0.0, now_s)
        self.at_s = None

    def per_s(self) -> float | None:
        """The rate; None while it is unknown."""
        if self.elapsed_s < _RATE_KNOWN_S:
            return None
        return self.amount / self.elapsed_s

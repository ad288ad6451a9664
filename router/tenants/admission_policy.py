"""Which requests begin, wait or are refused: a policy, sans-I/O, for one model of one gateway.

A request that comes is checked against its tenant's rates, against the room in the queue and
against the time it would wait, and is refused at once, with the time to come back, if it cannot
be served. Else it waits its turn in a `FairQueue`, and begins as soon as the model's groups have
room for it. A full queue makes room by refusing the last request of whoever waits most, so that a
tenant that floods is refused for its own requests, not others for theirs.

Knows tenants, costs and a clock that is passed in; knows nothing of sockets, tasks or groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from arriero.router.tenants.bucket import Bucket
from arriero.router.tenants.fair_queue import OUTPUT_COST, PROMPT_COST, FairQueue
from arriero.router.tenants.tenant import QueueLimits, Tenant
from arriero.shards.errors import Overloaded

FIRST_GUESS_OUTPUT = 128
"""Output tokens that a sample is expected to give, before any has ended."""
_MEAN_WEIGHT = 0.2
"""Of the latest request in the mean of its tenant's; a new tenant begins with everybody's."""
_SERVED_HALF_LIFE_S = 5.0
_RATE_KNOWN_S = 0.5
"""Service must have been watched for so long before waits are estimated from it."""


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request at the door.

    Attributes:
        tenant: whose it is.
        num_prompt: prompt tokens.
        max_output: most output tokens, of all samples together.
        num_sequences: samples; each takes a place in a group.
        priority: among the tenant's own, lower goes first.
        deadline_s: when the caller will be gone, on the clock; None for never.
        cost: what it is expected to take.
        arrived_s: when it came.
        num_output: output tokens so far.
        due: cost of the output that is still expected.
        begun: it has begun.
        refusal: why it was refused while it waited.
        left: it has ended.
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
    due: float = 0.0
    begun: bool = False
    refusal: Overloaded | None = None
    left: bool = False


@dataclass(slots=True)
class _Usage:
    """What a tenant takes now, and the output tokens of a sample in its latest requests."""

    mean_output: float
    running: int = 0
    requests: Bucket | None = None
    tokens: Bucket | None = None


class AdmissionPolicy:
    """The door of one model.

    `offer` a request, ask `turns` for those that may begin (after every call that may free a
    place), tell `used` what they give, and `leave` when they end, however they end.

    Args:
        limits: of the queue.

    Attributes:
        limits: the same; others may be set at any time. A tenant's count from its next request on.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self._queue: FairQueue[QueuedRequest] = FairQueue()
        self._usage: dict[str, _Usage] = {}
        self._served = _Rate()
        self._sequences = 0
        self._mean_output = float(FIRST_GUESS_OUTPUT)

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def num_sequences(self) -> int:
        """Samples of requests that have begun."""
        return self._sequences

    @property
    def backlog_s(self) -> float:
        """Seconds until all that waits has been served, at the rate of late; 0 if not known."""
        return self._wait_s(self._queue.cost)

    def waiting_by_tenant(self) -> dict[str, int]:
        """Requests that wait, of each tenant that was ever here."""
        return dict(self._queue.sizes())

    def offer(self, ticket: QueuedRequest, now_s: float) -> QueuedRequest | None:
        """Take a request into the queue; gives one that was pushed out for it, if any.

        Raises:
            Overloaded: it is refused, and why, and when to come back.
        """
        tenant, limits = ticket.tenant, self.limits
        usage = self._usage_of(tenant, now_s)
        output = _expected_output(ticket, usage)
        ticket.cost = PROMPT_COST * ticket.num_prompt + OUTPUT_COST * output
        self._check(tenant, ticket.num_prompt, ticket.cost, ticket.deadline_s, now_s)
        ticket.arrived_s = now_s
        self._queue.push(tenant, ticket, cost=ticket.cost, priority=ticket.priority)
        if usage.requests is not None:
            usage.requests.take(1, now_s)
        if usage.tokens is not None:
            usage.tokens.take(ticket.num_prompt, now_s)
        if len(self._queue) <= limits.max_queued:
            return None
        pushed_out = self._queue.push_out()
        pushed_out.refusal = self._full(pushed_out.tenant, pushed_out.cost)
        self._give_back(pushed_out, now_s)
        if pushed_out is ticket:
            raise pushed_out.refusal
        return pushed_out

    def refuse_early(
        self, tenant: Tenant, priority: int, deadline_s: float | None, now_s: float
    ) -> None:
        """Refuse a request before work is spent on it, if `offer` would however short it is.

        Args:
            tenant: whose it is.
            priority: among the tenant's own.
            deadline_s: when the caller will be gone, on the clock; None for never.
            now_s: the time.

        Raises:
            Overloaded: as `offer`.
        """
        least = PROMPT_COST + OUTPUT_COST
        self._check(tenant, 1, least, deadline_s, now_s)
        full = len(self._queue) >= self.limits.max_queued
        if full and self._queue.would_push_out(tenant, priority):
            raise self._full(tenant, least)

    def turns(self, room: int, now_s: float) -> list[QueuedRequest]:
        """Requests that begin now.

        Args:
            room: samples that the model's groups take from this gateway at once, those that have
                begun included. A request with more samples than that begins alone.
            now_s: the time.
        """

        def may_go(name: str, ticket: QueuedRequest) -> bool:
            most = ticket.tenant.max_running
            return most is None or self._usage[name].running < most

        begun = []
        while len(self._queue) and self._sequences < room:
            ticket = self._queue.pop(may_go)
            if ticket is None:
                break
            ticket.begun = True
            usage = self._usage[ticket.tenant.name]
            usage.running += 1
            self._sequences += ticket.num_sequences
            self._charge(ticket, PROMPT_COST * ticket.num_prompt, now_s)
            self._expect(ticket, OUTPUT_COST * _expected_output(ticket, usage))
            begun.append(ticket)
        return begun

    def used(self, ticket: QueuedRequest, num_tokens: int, now_s: float) -> None:
        """Count output tokens of a request that has begun."""
        cost = OUTPUT_COST * num_tokens
        ticket.num_output += num_tokens
        self._charge(ticket, cost, now_s)
        self._expect(ticket, max(0.0, ticket.due - cost))
        tokens = self._usage[ticket.tenant.name].tokens
        if tokens is not None:
            tokens.take(num_tokens, now_s)

    def leave(self, ticket: QueuedRequest, now_s: float) -> None:
        """A request ended: well, in an error, or because its caller left; safe to call twice."""
        if ticket.left:
            return
        ticket.left = True
        if ticket.begun:
            usage = self._usage[ticket.tenant.name]
            usage.running -= 1
            self._sequences -= ticket.num_sequences
            if not self._sequences and not len(self._queue):
                self._served.pause(now_s)
            self._expect(ticket, 0.0)
            output = ticket.num_output / ticket.num_sequences
            usage.mean_output += _MEAN_WEIGHT * (output - usage.mean_output)
            self._mean_output += _MEAN_WEIGHT / 4 * (output - self._mean_output)
        elif ticket.refusal is None:
            self._queue.remove(ticket.tenant.name, ticket)
            self._give_back(ticket, now_s)

    def late(self, ticket: QueuedRequest, now_s: float) -> Overloaded:
        """What a request is told that has waited as long as it may."""
        return Overloaded(
            f"it waited {now_s - ticket.arrived_s:.1f} s, which is the most, and was not begun",
            self._wait_s(self._queue.cost_before(ticket.tenant)),
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
        """Raise what speaks against a request before it stands in the queue."""
        usage = self._usage_of(tenant, now_s)
        for name, bucket, amount, limit in (
            ("requests_per_minute", usage.requests, 1, tenant.requests_per_minute),
            ("tokens_per_minute", usage.tokens, num_prompt, tenant.tokens_per_minute),
        ):
            if bucket is not None and (wait_s := bucket.wait_s(amount, now_s)):
                raise Overloaded(
                    f"tenant {tenant.name!r} has used up `{name}`={limit:g}; "
                    f"come back in {wait_s:.1f} s",
                    wait_s,
                )
        if tenant.max_queued is not None and self._queue.waiting(tenant.name) >= tenant.max_queued:
            raise Overloaded(
                f"tenant {tenant.name!r} has {tenant.max_queued} requests waiting, which is its "
                "`max_queued`; send fewer at once",
                self._wait_s(cost),
            )
        if not len(self._queue):
            return  # it may have to wait for a place, but for nobody's turn
        wait_s = self._wait_s(self._queue.cost_before(tenant))
        if wait_s > self.limits.max_wait_s:
            raise Overloaded(
                f"it would wait about {wait_s:.0f} s for others; the most is "
                f"{self.limits.max_wait_s:g} s",
                wait_s - self.limits.max_wait_s,
            )
        if deadline_s is not None and now_s + wait_s > deadline_s:
            raise Overloaded(
                f"it would wait about {wait_s:.1f} s for others, and its deadline is in "
                f"{max(0.0, deadline_s - now_s):.1f} s; give it longer, or come back",
                wait_s,
            )

    def _full(self, tenant: Tenant, cost: float) -> Overloaded:
        return Overloaded(
            f"{self.limits.max_queued} requests wait, which is the most, and tenant "
            f"{tenant.name!r} has most of them; send fewer at once",
            self._wait_s(cost),
        )

    def _wait_s(self, cost: float) -> float:
        return cost / rate if (rate := self._served.per_s()) else 0.0

    def _expect(self, ticket: QueuedRequest, due: float) -> None:
        self._queue.expect(ticket.tenant, due - ticket.due)
        ticket.due = due

    def _charge(self, ticket: QueuedRequest, cost: float, now_s: float) -> None:
        self._queue.charge(ticket.tenant, cost)
        self._served.add(cost, now_s)

    def _give_back(self, ticket: QueuedRequest, now_s: float) -> None:
        usage = self._usage[ticket.tenant.name]
        if usage.tokens is not None:
            usage.tokens.take(-ticket.num_prompt, now_s)


def _bucket(bucket: Bucket | None, per_minute: float | None, now_s: float) -> Bucket | None:
    """The bucket of a limit, which may have been changed."""
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now_s)
    bucket.change(per_minute, now_s)
    return bucket


def _expected_output(ticket: QueuedRequest, usage: _Usage) -> float:
    """Output tokens of a request, by what its tenant's latest gave."""
    return min(float(ticket.max_output), usage.mean_output * ticket.num_sequences)


@dataclass(slots=True)
class _Rate:
    """Cost served a second while there was something to serve; older seconds count less."""

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
        """Nothing is left to serve; the time until the next `add` does not count."""
        self.add(0.0, now_s)
        self.at_s = None

    def per_s(self) -> float | None:
        """The rate, or None while it is not known."""
        if self.elapsed_s < _RATE_KNOWN_S:
            return None
        return self.amount / self.elapsed_s

"""Admission control of a gateway: finds the caller's tenant and starts requests in turn.

Runs the policies of this folder in real time. Knows tasks and the clock; knows nothing of the
content of a request or of the group that computes the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from arriero.router.tenants import model_scope
from arriero.router.tenants.admission_policy import AdmissionPolicy, QueuedRequest
from arriero.router.tenants.day_budgets import DayBudgets
from arriero.router.tenants.keys import KeyFile
from arriero.router.tenants.tenant import ANYONE, QueueLimits, Tenant
from arriero.shards.errors import PermissionDenied, Unauthenticated

_TICK_S = 0.25
"""Seconds between two looks at the key file and at room that appears without a departure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The sender of a call.

    Attributes:
        request_id: name of the call in logs.
        tenant: tenant of the caller.
        deadline_s: monotonic time at which the caller gives up; None for never.
        traceparent: W3C name of the caller's span; "" for none.
        strict_schema: refuse a JSON Schema that cannot be enforced completely.
        cache_key: name of the session whose prompts share a prefix; "" for none.
        background: the request waits for what interactive requests leave free.
    """

    request_id: str
    tenant: Tenant = field(default_factory=lambda: Tenant(name=ANYONE))
    deadline_s: float | None = None
    traceparent: str = ""
    strict_schema: bool = False
    cache_key: str = ""
    background: bool = False

    @property
    def queue_tenant(self) -> Tenant:
        """The tenant in whose queue the caller's requests wait."""
        return self.tenant.in_background() if self.background else self.tenant


def is_set(header: str) -> bool:
    """Whether a header turns a switch on; any value but "", 0, false, no and off does."""
    return header.strip().lower() not in ("", "0", "false", "no", "off")


class AdmissionController:
    """Admits the requests of all tenants.

    Args:
        limits: of each model's queue.
        tenants: by name, each with this gateway's share of the limits. A tenant of the key file
            that is missing here has no limits.
        keys: keys of the callers; None admits callers without a key, as tenant `ANYONE`.
        room: by model, number of samples that its groups take from this gateway at once.
        num_groups: by model, number of its groups.

    Attributes:
        budgets: tokens that the tenants have used today.
    """

    def __init__(
        self,
        limits: QueueLimits,
        tenants: Mapping[str, Tenant],
        keys: KeyFile | None,
        room: Callable[[str], int],
        num_groups: Callable[[str], int] = lambda model: 1,
    ) -> None:
        self._limits = limits
        self._tenants = dict(tenants)
        self._keys = keys
        self._room = room
        self._num_groups = num_groups
        self.budgets = DayBudgets()
        self._policies: dict[str, AdmissionPolicy] = {}
        self._waiters: dict[QueuedRequest, asyncio.Future[None]] = {}
        self._ticking: asyncio.Task[None] | None = None

    @property
    def open(self) -> bool:
        """Whether callers need no key."""
        return self._keys is None

    def priority(self, caller: Caller, asked: int) -> int:
        """Priority in a group; with several tenants, the tenant's counts, not the caller's."""
        if caller.background or not self.open:
            return caller.queue_tenant.priority
        return asked

    @property
    def has_day_budgets(self) -> bool:
        """Whether the tokens of a tenant are limited for a day."""
        return any(tenant.has_day_budget for tenant in self._tenants.values())

    def start(self) -> None:
        """Start to watch the key file and the room of the groups."""
        self._ticking = asyncio.create_task(self._tick())

    def stop(self) -> None:
        """Stop watching the key file and the room of the groups."""
        if self._ticking is not None:
            self._ticking.cancel()

    def reload(self, limits: QueueLimits, tenants: Mapping[str, Tenant]) -> None:
        """Use other limits for later requests; arguments as of the class."""
        self._limits, self._tenants = limits, dict(tenants)
        for policy in self._policies.values():
            policy.limits = limits

    def tenant(self, authorization: str) -> Tenant:
        """The tenant of a caller; limits the current task to the models of the caller's key.

        Args:
            authorization: value of the header `authorization`; "" for none.

        Raises:
            Unauthenticated: a key is needed and the header holds no valid key.
        """
        name = ANYONE
        models: tuple[str, ...] = ()
        if self._keys is not None:
            entry = self._keys.keys.entry(authorization)
            name, models = entry.tenant, entry.models
        model_scope.enter(models)
        return self.named(name)

    def named(self, name: str) -> Tenant:
        """The tenant of a name, with its current limits."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(name=name)
        return tenant

    def knows(self, authorization: str) -> bool:
        """Whether a caller may see more than a stranger: holds a valid key, or none is needed.

        Limits the current task as `tenant` does.
        """
        try:
            self.tenant(authorization)
        except Unauthenticated:
            return False
        return True

    def check_metrics(self, authorization: str) -> None:
        """Raise unless the caller may read the metrics; the metrics show every tenant.

        Raises:
            Unauthenticated: a key is needed and the header holds no valid key.
            PermissionDenied: the tenant may not read the metrics.
        """
        if self._keys is not None and not (tenant := self.tenant(authorization)).metrics:
            raise PermissionDenied(
                f"tenant {tenant.name!r} may not read the metrics; set `metrics: true` for the "
                "tenant in the spec"
            )

    def waiting(self) -> dict[tuple[str, str], int]:
        """Number of waiting requests, by model and tenant."""
        return {
            (model, tenant): waiting
            for model, policy in self._policies.items()
            for tenant, waiting in policy.waiting_by_tenant().items()
        }

    def demand(self) -> dict[str, tuple[int, float]]:
        """By model, number of waiting requests and the seconds to serve all of these requests.

        Background requests wait for free room and ask for no further groups.
        """
        return {
            model: (num_waiting, policy.backlog_s)
            for model, policy in self._policies.items()
            if (num_waiting := policy.num_waiting_interactive)
        }

    def refuse_early(self, model: str, caller: Caller, priority: int) -> None:
        """Refuse a hopeless request before work is spent on it.

        Args:
            model: a served model.
            caller: sender of the request.
            priority: of the request, among the requests of the tenant.

        Raises:
            Overloaded: `admit` would refuse any request of this caller and priority.
        """
        tenant = caller.queue_tenant
        self.budgets.check(tenant, model)
        policy = self._policies.get(model)
        if policy is not None:
            policy.refuse_early(tenant, priority, caller.deadline_s, time.monotonic())

    @asynccontextmanager
    async def admit(self, model: str, request: QueuedRequest) -> AsyncIterator[Admitted]:
        """Wait for the request's turn; the request counts as running until the block ends.

        Args:
            model: a served model.
            request: the request to queue.

        Raises:
            Overloaded: the request is refused, at once or after `max_wait_s`.
        """
        self.budgets.check(request.tenant, model)
        policy = self._policies.get(model)
        if policy is None:
            policy = self._policies[model] = AdmissionPolicy(self._limits)
        pushed_out = policy.enqueue(request, time.monotonic())
        if pushed_out is not None:
            self._wake(pushed_out)
        try:
            self._start_next(model, policy)
            if not request.started:
                await self._wait(policy, request)
            self.budgets.charge(request.tenant, model, request.num_prompt)
            yield Admitted(self, model, policy, request)
        finally:
            self._release(model, policy, request)

    async def _wait(self, policy: AdmissionPolicy, request: QueuedRequest) -> None:
        waiter = self._waiters[request] = asyncio.get_running_loop().create_future()
        most_s = None if request.tenant.background else self._limits.max_wait_s
        if request.deadline_s is not None:
            left_s = request.deadline_s - request.arrived_s
            most_s = left_s if most_s is None else min(most_s, left_s)
        try:
            async with asyncio.timeout(most_s):
                await waiter
        except TimeoutError:
            raise policy.timeout_error(request, time.monotonic()) from None
        finally:
            del self._waiters[request]
        if request.refusal is not None:
            raise request.refusal

    def _release(self, model: str, policy: AdmissionPolicy, request: QueuedRequest) -> None:
        policy.release(request, time.monotonic())
        self._start_next(model, policy)

    def _start_next(self, model: str, policy: AdmissionPolicy) -> None:
        if policy.num_waiting:
            room, num_groups = self._room(model), self._num_groups(model)
            for request in policy.start_next(room, time.monotonic(), num_groups):
                self._wake(request)

    def _wake(self, request: QueuedRequest) -> None:
        waiter = self._waiters.get(request)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if self._keys is not None:
                self._keys.refresh()
            for model, policy in self._policies.items():
                self._start_next(model, policy)


class Admitted:
    """An admitted request; counts its output."""

    __slots__ = ("_admission", "_model", "_policy", "_request")

    def __init__(
        self,
        admission: AdmissionController,
        model: str,
        policy: AdmissionPolicy,
        request: QueuedRequest,
    ) -> None:
        self._admission = admission
        self._model = model
        self._policy = policy
        self._request = request

    def count_output(self, num_tokens: int, now_s: float) -> None:
        """Count output tokens."""
        is_first = self._request.last_output_s is None
        self._policy.count_output(self._request, num_tokens, now_s)
        if is_first:  # background requests wait for the first tokens of others
            self._admission._start_next(self._model, self._policy)
        self._admission.budgets.charge(self._request.tenant, self._model, num_tokens)

    def release(self) -> None:
        """Free the room before the block ends: the last token is computed, maybe not yet sent."""
        self._admission._release(self._model, self._policy, self._request)

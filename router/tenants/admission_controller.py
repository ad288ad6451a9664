"""The door of a gateway: who a caller is, and when its request begins.

Drives the policies of this folder in real time. Knows tasks and the clock; knows nothing of what
a request asks or of which group will compute it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from arriero.router.tenants.admission_policy import AdmissionPolicy, QueuedRequest
from arriero.router.tenants.keys import KeyFile
from arriero.router.tenants.tenant import ANYONE, QueueLimits, Tenant
from arriero.shards.errors import PermissionDenied

_TICK_S = 0.25
"""How often it looks for room that no departure told of, and at the key file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who makes a call.

    Attributes:
        request_id: the call's name in logs.
        tenant: whose it is.
        deadline_s: when the caller will be gone, on the monotonic clock; None for never.
        traceparent: W3C name of the caller's span; "" for none.
        strict_schema: a JSON Schema that cannot be enforced to its last word is refused.
    """

    request_id: str
    tenant: Tenant = field(default_factory=lambda: Tenant(name=ANYONE))
    deadline_s: float | None = None
    traceparent: str = ""
    strict_schema: bool = False


def is_set(header: str) -> bool:
    """Whether a header that is a switch is on; any value but an off word turns it on."""
    return header.strip().lower() not in ("", "0", "false", "no", "off")


class AdmissionController:
    """Every tenant's way in.

    Args:
        limits: of each model's queue.
        tenants: by name, with the shares that this gateway enforces. A key whose tenant is not
            among them has no limits of its own.
        keys: the callers' keys; None lets anyone in, under the name `ANYONE`.
        room: samples that a model's groups take from this gateway at once.
    """

    def __init__(
        self,
        limits: QueueLimits,
        tenants: Mapping[str, Tenant],
        keys: KeyFile | None,
        room: Callable[[str], int],
    ) -> None:
        self._limits = limits
        self._tenants = dict(tenants)
        self._keys = keys
        self._room = room
        self._models: dict[str, AdmissionPolicy] = {}
        self._waiters: dict[QueuedRequest, asyncio.Future[None]] = {}
        self._ticking: asyncio.Task[None] | None = None

    @property
    def open(self) -> bool:
        """Whether callers need no key."""
        return self._keys is None

    def start(self) -> None:
        """Follow the key file, and the groups' room, from now on."""
        self._ticking = asyncio.create_task(self._tick())

    def stop(self) -> None:
        """Follow them no more."""
        if self._ticking is not None:
            self._ticking.cancel()

    def reload(self, limits: QueueLimits, tenants: Mapping[str, Tenant]) -> None:
        """Take other limits, for requests that come from now on; see the class."""
        self._limits, self._tenants = limits, dict(tenants)
        for admission in self._models.values():
            admission.limits = limits

    def tenant(self, authorization: str) -> Tenant:
        """Who says so.

        Raises:
            Unauthenticated: a key is needed, and this is none.
        """
        name = ANYONE if self._keys is None else self._keys.keys.tenant(authorization)
        found = self._tenants.get(name)
        if found is None:
            found = self._tenants[name] = Tenant(name=name)
        return found

    def check_metrics(self, authorization: str) -> None:
        """Raise unless the caller may read the metrics, which tell of every tenant.

        Raises:
            Unauthenticated: a key is needed, and this is none.
            PermissionDenied: its tenant may not.
        """
        if self._keys is not None and not (tenant := self.tenant(authorization)).metrics:
            raise PermissionDenied(
                f"tenant {tenant.name!r} may not read the metrics; the spec's `metrics: true` of "
                "a tenant allows it"
            )

    def waiting(self) -> dict[tuple[str, str], int]:
        """Requests that wait here, by model and tenant."""
        return {
            (model, tenant): waiting
            for model, admission in self._models.items()
            for tenant, waiting in admission.waiting_by_tenant().items()
        }

    def demand(self) -> dict[str, tuple[int, float]]:
        """Requests that wait here, by model, and the predicted wait of all of them, in seconds."""
        return {
            model: (admission.num_waiting, admission.backlog_s)
            for model, admission in self._models.items()
            if admission.num_waiting
        }

    def refuse_early(self, model: str, caller: Caller, priority: int) -> None:
        """Refuse a request before work is spent on it, if it has no chance.

        Args:
            model: one that is served.
            caller: whose it is.
            priority: among its tenant's own.

        Raises:
            Overloaded: it has none.
        """
        admission = self._models.get(model)
        if admission is not None:
            now_s = time.monotonic()
            admission.refuse_early(caller.tenant, priority, caller.deadline_s, now_s)

    @asynccontextmanager
    async def place(self, model: str, ticket: QueuedRequest) -> AsyncIterator[Admitted]:
        """A place in the model's groups, once it is the request's turn, until the block ends.

        Args:
            model: one that is served.
            ticket: of the request.

        Raises:
            Overloaded: it is refused, at once or after `max_wait_s`.
        """
        admission = self._models.get(model)
        if admission is None:
            admission = self._models[model] = AdmissionPolicy(self._limits)
        pushed_out = admission.offer(ticket, time.monotonic())
        if pushed_out is not None:
            self._wake(pushed_out)
        try:
            self._begin(model, admission)
            if not ticket.begun:
                await self._wait(admission, ticket)
            yield Admitted(self, model, admission, ticket)
        finally:
            self._leave(model, admission, ticket)

    async def _wait(self, admission: AdmissionPolicy, ticket: QueuedRequest) -> None:
        waiter = self._waiters[ticket] = asyncio.get_running_loop().create_future()
        most_s = self._limits.max_wait_s
        if ticket.deadline_s is not None:
            most_s = min(most_s, ticket.deadline_s - ticket.arrived_s)
        try:
            async with asyncio.timeout(most_s):
                await waiter
        except TimeoutError:
            raise admission.late(ticket, time.monotonic()) from None
        finally:
            del self._waiters[ticket]
        if ticket.refusal is not None:
            raise ticket.refusal

    def _leave(self, model: str, admission: AdmissionPolicy, ticket: QueuedRequest) -> None:
        admission.leave(ticket, time.monotonic())
        self._begin(model, admission)

    def _begin(self, model: str, admission: AdmissionPolicy) -> None:
        if admission.num_waiting:
            for ticket in admission.turns(self._room(model), time.monotonic()):
                self._wake(ticket)

    def _wake(self, ticket: QueuedRequest) -> None:
        waiter = self._waiters.get(ticket)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if self._keys is not None:
                self._keys.refresh()
            for model, admission in self._models.items():
                self._begin(model, admission)


class Admitted:
    """A request's place; tell it what comes out."""

    __slots__ = ("_admission", "_door", "_model", "_ticket")

    def __init__(
        self,
        door: AdmissionController,
        model: str,
        admission: AdmissionPolicy,
        ticket: QueuedRequest,
    ) -> None:
        self._door = door
        self._model = model
        self._admission = admission
        self._ticket = ticket

    def used(self, num_tokens: int, now_s: float) -> None:
        """Count output tokens."""
        self._admission.used(self._ticket, num_tokens, now_s)

    def leave(self) -> None:
        """Give it up before the block ends: the last token is out, though not yet sent."""
        self._door._leave(self._model, self._admission, self._ticket)

"""Whose turn it is: a virtual token counter for each tenant, sans-I/O.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): every tenant has a
counter of the tokens it was served, output tokens counting more than prompt tokens, divided by its
weight. The tenant goes next whose counter, with what its running requests are still expected to
take, is the lowest (the paper's variant with length prediction). By the counter alone, a tenant
would be given all the places that become free at once before it had paid for the first of them, and
shares would be even only over many sets of places.

A tenant that comes back from having nothing waiting is lifted to the lowest counter of those that
wait, so that idleness earns no credit: among tenants that keep waiting, service differs by a
bounded number of tokens, whatever each sends. What was expected and did not come counts for nothing
afterwards. Tenants of a lower priority number go first, always.

Knows tenants, costs and items; knows nothing of clocks, limits or requests.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from arriero.router.tenants.tenant import Tenant

T = TypeVar("T")

PROMPT_COST, OUTPUT_COST = 1.0, 2.0
"""Of one token. The paper's weights: an output token takes a step, a prompt token part of one."""


@dataclass(slots=True)
class _Line(Generic[T]):
    """A tenant's items, its counter, and what its running requests are still expected to take."""

    weight: float
    priority: int
    counter: float = 0.0
    expected: float = 0.0
    # (priority among its own, arrival, cost, item)
    items: list[tuple[int, int, float, T]] = field(default_factory=list)
    cost: float = 0.0


class FairQueue(Generic[T]):
    """Items of several tenants, in fair order.

    A tenant is kept for as long as the queue is, since its counter is.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._arrivals = 0
        self._size = 0
        self._last_left = 0.0  # the counter of the line that emptied last

    def __len__(self) -> int:
        return self._size

    @property
    def cost(self) -> float:
        """Of all that waits."""
        return sum(line.cost for line in self._lines.values())

    def push(self, tenant: Tenant, item: T, *, cost: float, priority: int = 0) -> None:
        """Add an item.

        Args:
            tenant: whose it is; its weight and priority count from now on.
            item: anything.
            cost: what it is expected to take, for `cost_before`.
            priority: among the tenant's own items, lower goes first; equal ones by arrival.
        """
        line = self._lines.get(tenant.name)
        if line is None:
            line = self._lines[tenant.name] = _Line(tenant.weight, tenant.priority)
        line.expected *= line.weight / tenant.weight  # it may have been changed
        line.weight, line.priority = tenant.weight, tenant.priority
        if not line.items:
            self._lift(line)
        self._arrivals += 1
        insort(line.items, (priority, self._arrivals, cost, item), key=lambda entry: entry[:2])
        line.cost += cost
        self._size += 1

    def pop(self, may_go: Callable[[str, T], bool]) -> T | None:
        """Take the next item of the first tenant in fair order whose next item may go."""
        for name in self._order():
            line = self._lines[name]
            if may_go(name, line.items[0][3]):
                return self._take(line, 0)
        return None

    def remove(self, tenant: str, item: T) -> None:
        """Take an item out, wherever it stands; does nothing when it is not there."""
        line = self._lines.get(tenant)
        if line is None:
            return
        for at, entry in enumerate(line.items):
            if entry[3] is item:
                self._take(line, at)
                return

    def push_out(self) -> T:
        """Take the last item of the tenant with the most waiting, by cost over weight."""
        line = self._longest()
        return self._take(line, len(line.items) - 1)

    def would_push_out(self, tenant: Tenant, priority: int) -> bool:
        """Whether an item that a tenant added now would be the one that `push_out` takes."""
        line = self._longest()
        return line is self._lines.get(tenant.name) and priority >= line.items[-1][0]

    def expect(self, tenant: Tenant, cost: float) -> None:
        """Count what a tenant's running requests are expected to take; negative, when they did."""
        line = self._lines.get(tenant.name)
        if line is not None:
            line.expected += cost / line.weight

    def charge(self, tenant: Tenant, cost: float) -> None:
        """Count service that a tenant was given."""
        line = self._lines.get(tenant.name)
        if line is not None:
            line.counter += cost / line.weight

    def waiting(self, tenant: str) -> int:
        """How many of a tenant's items wait."""
        line = self._lines.get(tenant)
        return 0 if line is None else len(line.items)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Every tenant that was ever here, and how many of its items wait."""
        return ((name, len(line.items)) for name, line in self._lines.items())

    def cost_before(self, tenant: Tenant) -> float:
        """The cost that is served before an item which a tenant would add now: an estimate.

        While it works off its own line, each other tenant of the same priority is served in
        proportion to their weights, and no more than it has waiting.
        """
        own = self._lines.get(tenant.name)
        own_cost = 0.0 if own is None else own.cost
        total = own_cost
        for name, line in self._lines.items():
            if name == tenant.name or not line.items or line.priority > tenant.priority:
                continue
            if line.priority < tenant.priority:
                total += line.cost
            else:
                first = line.items[0][2]  # who has nothing waiting still takes turns
                turn = max(own_cost, first * tenant.weight / line.weight)
                total += min(line.cost, turn * line.weight / tenant.weight)
        return total

    def _longest(self) -> _Line[T]:
        assert self._size, "nothing waits"
        return max(self._lines.values(), key=lambda line: line.cost / line.weight)

    def _order(self) -> list[str]:
        waiting = [(line, name) for name, line in self._lines.items() if line.items]
        waiting.sort(key=lambda one: (one[0].priority, one[0].counter + one[0].expected, one[1]))
        return [name for _, name in waiting]

    def _lift(self, line: _Line[T]) -> None:
        counters = [
            other.counter
            for other in self._lines.values()
            if other.items and other.priority == line.priority
        ]
        line.counter = max(line.counter, min(counters) if counters else self._last_left)

    def _take(self, line: _Line[T], at: int) -> T:
        _, _, cost, item = line.items.pop(at)
        line.cost = line.cost - cost if line.items else 0.0
        self._size -= 1
        if not line.items:
            self._last_left = line.counter
        return item

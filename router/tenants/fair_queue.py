"""A fair queue: a virtual token counter for each tenant orders the tenants, sans-I/O.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
counter of the tokens served to the tenant, divided by the tenant's weight; an output token counts
more than a prompt token. The next tenant is the tenant with the lowest sum of the counter and the
expected cost of its running requests (the paper's variant with length prediction). With the counter
alone, a tenant would get all room that becomes free at once before paying for any of it, and shares
would be even only over a long time.

An idle tenant that sends again starts at the lowest counter of the waiting tenants, so idle time
earns no credit: among tenants that always have waiting items, service differs by a bounded number
of tokens, whatever each tenant sends. Expected cost that does not arrive is removed again. Tenants
with a lower priority number always go first.

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
"""Cost of a token, as in the paper: an output token takes a step, a prompt token part of a step."""


@dataclass(slots=True)
class _Line(Generic[T]):
    """Items of a tenant, its counter, and the expected remaining cost of its running requests."""

    weight: float
    priority: int
    counter: float = 0.0
    expected: float = 0.0
    # (priority among the tenant's items, arrival, cost, item)
    items: list[tuple[int, int, float, T]] = field(default_factory=list)
    cost: float = 0.0


class FairQueue(Generic[T]):
    """Items of several tenants, in fair order.

    A tenant with no items stays, because its counter must stay.
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
        """Cost of all waiting items."""
        return sum(line.cost for line in self._lines.values())

    def cost_before_priority(self, priority: int) -> float:
        """Cost of the waiting items of tenants that go before a priority."""
        return sum(line.cost for line in self._lines.values() if line.priority < priority)

    def num_before_priority(self, priority: int) -> int:
        """Number of waiting items of tenants that go before a priority."""
        return sum(len(line.items) for line in self._lines.values() if line.priority < priority)

    def push(self, tenant: Tenant, item: T, *, cost: float, priority: int = 0) -> None:
        """Add an item.

        Args:
            tenant: tenant of the item; the tenant's weight and priority count from now on.
            item: any object.
            cost: expected cost of the item, for `cost_before`.
            priority: among the tenant's items; lower goes first, equal priorities by arrival.
        """
        line = self._lines.get(tenant.name)
        if line is None:
            line = self._lines[tenant.name] = _Line(tenant.weight, tenant.priority)
        line.expected *= line.weight / tenant.weight  # the weight may have changed
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
        """Remove an item at any position; does nothing when the item is absent."""
        line = self._lines.get(tenant)
        if line is None:
            return
        for at, entry in enumerate(line.items):
            if entry[3] is item:
                self._take(line, at)
                return

    def push_out(self) -> T:
        """Take the last item of the tenant with the most waiting cost per weight."""
        line = self._longest()
        return self._take(line, len(line.items) - 1)

    def would_push_out(self, tenant: Tenant, priority: int) -> bool:
        """Whether `push_out` would take an item that the tenant adds now."""
        line = self._longest()
        return line is self._lines.get(tenant.name) and priority >= line.items[-1][0]

    def expect(self, tenant: Tenant, cost: float) -> None:
        """Add to the expected cost of a tenant's running requests; negative once it arrived."""
        line = self._lines.get(tenant.name)
        if line is not None:
            line.expected += cost / line.weight

    def charge(self, tenant: Tenant, cost: float) -> None:
        """Count service given to a tenant."""
        line = self._lines.get(tenant.name)
        if line is not None:
            line.counter += cost / line.weight

    def waiting(self, tenant: str) -> int:
        """How many of a tenant's items wait."""
        line = self._lines.get(tenant)
        return 0 if line is None else len(line.items)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """Each tenant ever seen, and the number of its waiting items."""
        return ((name, len(line.items)) for name, line in self._lines.items())

    def cost_before(self, tenant: Tenant) -> float:
        """Estimated cost that is served before an item that the tenant adds now.

        While the tenant's own items are served, each other tenant of the same priority is served in
        proportion to the weights, up to the cost of its waiting items.
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
                first = line.items[0][2]  # a tenant without waiting items still takes turns
                turn = max(own_cost, first * tenant.weight / line.weight)
                total += min(line.cost, turn * line.weight / tenant.weight)
        return total

    def _longest(self) -> _Line[T]:
        assert self._size, "nothing waits"
        return max(self._lines.values(), key=lambda line: line.cost / line.weight)

    def _order(self) -> list[str]:
        waiting = [(line, name) for name, line in self._lines.items() if line.items]
        waiting.sort(
            key=lambda entry: (entry[0].priority, entry[0].counter + entry[0].expected, entry[1])
        )
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

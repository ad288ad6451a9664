"""Budgets of tokens for a day, by tenant and by model, sans-I/O.

A day begins at 00:00 UTC. A request is refused once a budget is used up; output is charged as it is
computed, so the last request may overdraw. Gateways add what they charged to the sums of a ledger
and take the sums of all gateways from there (`take`, `merge`); without a ledger a gateway counts
for itself. Knows tenants, models and times that are passed in; knows nothing of the ledger's place.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from arriero.router.tenants.tenant import Tenant
from arriero.shards.errors import Overloaded

_DAY_S = 86_400

Spent = Mapping[str, Mapping[str, int]]
"""Tokens by tenant and model."""


def day_of(now_s: float) -> int:
    """The number of the day since 1970 of a time in seconds since 1970, UTC."""
    return int(now_s // _DAY_S)


class DayBudgets:
    """Tokens that tenants have used today.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._day = day_of(clock())
        self._known: dict[str, Counter[str]] = {}
        self._new: dict[str, Counter[str]] = {}

    def used(self, tenant: str, model: str = "") -> int:
        """Tokens that a tenant has used today, of a model or, with "", of all models."""
        self._turn()
        sums = (book.get(tenant, Counter[str]()) for book in (self._known, self._new))
        return sum(sum(book.values()) if not model else book[model] for book in sums)

    def check(self, tenant: Tenant, model: str) -> None:
        """Refuse a request of a tenant whose budget is used up.

        Raises:
            Overloaded: with the time of the reset, and the seconds until then.
        """
        limits = []
        if tenant.tokens_per_day is not None:
            limits.append(("`tokens_per_day`", tenant.tokens_per_day, self.used(tenant.account)))
        most = tenant.tokens_per_day_by_model.get(model)
        if most is not None:
            field = f"`tokens_per_day_by_model.{model}`"
            limits.append((field, most, self.used(tenant.account, model)))
        for field, limit, used in limits:
            if used >= limit:
                now_s = self._clock()
                reset_s = (day_of(now_s) + 1) * _DAY_S
                at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(reset_s))
                raise Overloaded(
                    f"tenant {tenant.account!r} has used {used} tokens today, and {field} is "
                    f"{limit}; the budget is full again at {at}, in {reset_s - now_s:.0f} s",
                    reset_s - now_s,
                )

    def charge(self, tenant: Tenant, model: str, num_tokens: int) -> None:
        """Count tokens of a tenant with a budget."""
        if tenant.has_day_budget:
            self._turn()
            self._new.setdefault(tenant.account, Counter())[model] += num_tokens

    def take(self) -> tuple[int, dict[str, dict[str, int]]]:
        """The day, and what was charged since the last call, to be added to the ledger."""
        self._turn()
        taken = {tenant: dict(tokens) for tenant, tokens in self._new.items()}
        self._new = {}
        self._add(self._known, taken)  # counts until the ledger's sums come
        return self._day, taken

    def give_back(self, day: int, taken: Spent) -> None:
        """Note that the ledger did not get what `take` gave; it is added with the next."""
        self._turn()
        if day == self._day:
            for tenant, tokens in taken.items():
                self._known.setdefault(tenant, Counter()).subtract(tokens)
            self._add(self._new, taken)

    def merge(self, day: int, total: Spent) -> None:
        """Take the sums of all gateways, with all that `take` gave before, in place of the own."""
        self._turn()
        if day == self._day:
            self._known = {tenant: Counter(tokens) for tenant, tokens in total.items()}

    def _turn(self) -> None:
        day = day_of(self._clock())
        if day != self._day:
            self._day, self._known, self._new = day, {}, {}

    @staticmethod
    def _add(book: dict[str, Counter[str]], spent: Spent) -> None:
        for tenant, tokens in spent.items():
            book.setdefault(tenant, Counter()).update(tokens)

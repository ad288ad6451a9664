"""The tokens that tenants have used today, over all gateways; sans-I/O.

Gateways add what they charged and get the sums. A gateway that starts again reads the sums by
adding nothing. Knows days, tenants and models; knows nothing of budgets and of the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenLedger:
    """Sums of one day.

    Attributes:
        day: number of the day since 1970, UTC.
        tokens: by tenant and model.
    """

    day: int = 0
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)

    def add(self, day: int, spent: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """Add tokens of a day; returns the sums of that day.

        A later day than the current one begins with empty sums; tokens of an earlier day, from a
        gateway whose clock is behind, are dropped.
        """
        if day > self.day:
            self.day, self.tokens = day, {}
        if day < self.day:
            return {}
        for tenant, models in spent.items():
            sums = self.tokens.setdefault(tenant, {})
            for model, count in models.items():
                sums[model] = sums.get(model, 0) + count
        return self.tokens

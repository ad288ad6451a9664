"""What a group's KV cache holds, and for whom: numbers for operators, and nothing more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TierUse:
    """Blocks of a tier.

    Attributes:
        used: blocks with something in them.
        total: most blocks; 0 for no bound.
    """

    used: int
    total: int


@dataclass(slots=True)
class TenantUse:
    """Prompt tokens of a tenant's requests, and those of them that a cache had."""

    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CacheReport:
    """One lane's cache, or a group's.

    Attributes:
        tiers: by name: device, host, disk, shared.
        tenants: what each asked for since the start.
        held: blocks below the device, by tier and tenant; "" for those found at the start.
        pins: tokens of each pinned prefix.
    """

    tiers: dict[str, TierUse] = field(default_factory=dict)
    tenants: dict[str, TenantUse] = field(default_factory=dict)
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    pins: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def total(reports: list[CacheReport]) -> CacheReport:
        """The sum over lanes."""
        if len(reports) == 1:
            return reports[0]
        tiers: dict[str, TierUse] = {}
        tenants: dict[str, TenantUse] = {}
        held: dict[str, Counter[str]] = {}
        for one in reports:
            for name, use in one.tiers.items():
                so_far = tiers.get(name, TierUse(0, 0))
                tiers[name] = TierUse(so_far.used + use.used, so_far.total + use.total)
            for name, asked in one.tenants.items():
                sums = tenants.setdefault(name, TenantUse())
                sums.prompt_tokens += asked.prompt_tokens
                sums.cached_tokens += asked.cached_tokens
            for name, blocks in one.held.items():
                held.setdefault(name, Counter()).update(blocks)
        pins = {name: count for one in reports for name, count in one.pins.items()}
        return CacheReport(tiers, tenants, {name: dict(of) for name, of in held.items()}, pins)

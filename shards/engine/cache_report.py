"""Contents of a group's KV cache, by tier and tenant: numbers for operators, and nothing more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TierUse:
    """Blocks of a tier.

    Attributes:
        used: blocks in use.
        total: most blocks; 0 means unbounded.
    """

    used: int
    total: int


@dataclass(slots=True)
class TenantUse:
    """Prompt tokens of a tenant's requests, and the cached share of these tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Cache of a data-parallel rank, or of a whole group.

    Attributes:
        tiers: use of each tier by name: device, host, disk, shared.
        tenants: prompt tokens of each tenant since the start.
        tenant_blocks: blocks below the device, by tier and tenant; tenant "" means blocks that
            the tier had at the start.
        pins: tokens of each pinned prefix.
    """

    tiers: dict[str, TierUse] = field(default_factory=dict)
    tenants: dict[str, TenantUse] = field(default_factory=dict)
    tenant_blocks: dict[str, dict[str, int]] = field(default_factory=dict)
    pins: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def total(reports: list[CacheReport]) -> CacheReport:
        """The sum over data-parallel ranks."""
        if len(reports) == 1:
            return reports[0]
        tiers: dict[str, TierUse] = {}
        tenants: dict[str, TenantUse] = {}
        tenant_blocks: dict[str, Counter[str]] = {}
        for report in reports:
            for tier, use in report.tiers.items():
                so_far = tiers.get(tier, TierUse(0, 0))
                tiers[tier] = TierUse(so_far.used + use.used, so_far.total + use.total)
            for tenant, tokens in report.tenants.items():
                sums = tenants.setdefault(tenant, TenantUse())
                sums.prompt_tokens += tokens.prompt_tokens
                sums.cached_tokens += tokens.cached_tokens
            for tier, blocks in report.tenant_blocks.items():
                tenant_blocks.setdefault(tier, Counter()).update(blocks)
        pins = {name: count for report in reports for name, count in report.pins.items()}
        by_tier = {tier: dict(blocks) for tier, blocks in tenant_blocks.items()}
        return CacheReport(tiers, tenants, by_tier, pins)

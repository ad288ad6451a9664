"""Contents of a group's KV cache, by tier and tenant: numbers for operators, and nothing more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from arriero.shards.engine.sequence_blocks import SequenceBlocks


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


def report_of(blocks: SequenceBlocks, tenants: dict[str, TenantUse]) -> CacheReport:
    """The report of a data-parallel rank.

    Args:
        blocks: blocks of sequences, on the device and below.
        tenants: prompt tokens of each tenant since the start.
    """
    pools = blocks.pools.values()
    device = TierUse(
        sum(pool.num_used + pool.num_cached for pool in pools),
        sum(pool.num_blocks for pool in pools),
    )
    counts, most = blocks.tiers.counts(), blocks.tiers.capacities()
    below = {
        tier: TierUse(counts.get(tier, 0), most.get(tier, 0))
        for tier in ("host", "disk", "shared")
        if most.get(tier) or counts.get(tier)
    }
    return CacheReport(
        tiers={"device": device, **below},
        tenants=tenants,
        tenant_blocks=blocks.tiers.tenants(),
        pins=blocks.pins,
    )

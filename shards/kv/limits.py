"""Limits of a group's tiers, and blocks that another group offers.

Knows numbers and keys; knows nothing of how blocks are transferred.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from arriero.shards.kv.transfers import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class TierLimits:
    """Limits of the tiers of one pool.

    Attributes:
        host_blocks, disk_blocks: most blocks; 0 for no such tier.
        shared: whether there is a shared store.
        max_tenant_share: largest share of a tier for one tenant's blocks.
        num_ranks: ranks with layers of the pool; a transfer is done when all have done it.
    """

    host_blocks: int = 0
    disk_blocks: int = 0
    shared: bool = False
    max_tenant_share: float = 1.0
    num_ranks: int = 1

    @property
    def enabled(self) -> bool:
        """Whether there is any tier below the device."""
        return bool(self.host_blocks or self.disk_blocks or self.shared)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTierLimits:
    """Limits of the tiers of a group.

    Attributes:
        all: limits for the pool of layers with full attention.
        local: limits for the pool of layers with chunked attention.
        bytes_share: bytes of a block below the device, as a share of its bytes on the device.
    """

    all: TierLimits = field(default_factory=TierLimits)
    local: TierLimits = field(default_factory=TierLimits)
    bytes_share: Fraction = Fraction(1)

    @property
    def enabled(self) -> bool:
        """Whether there is any tier below the device."""
        return self.all.enabled

    @property
    def num_blocks(self) -> int:
        """Most blocks of `Pool.ALL` in host memory and on disk."""
        return self.all.host_blocks + self.all.disk_blocks


@dataclass(frozen=True, slots=True)
class PeerBlocks:
    """Blocks of one pool in another group's host memory.

    Attributes:
        segments: host memory of each rank.
        slots: slot of each key.
    """

    segments: tuple[Segment, ...]
    slots: dict[bytes, int]

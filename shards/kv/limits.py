"""What an engine must know of its group's tiers, and of what another group has.

Knows numbers and keys; knows nothing of how blocks are moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from arriero.shards.kv.transfers import Segment


@dataclass(frozen=True, kw_only=True, slots=True)
class TierLimits:
    """What the tiers of one pool hold.

    Attributes:
        host_blocks, disk_blocks: most blocks; 0 for no such tier.
        shared: whether there is a shared store.
        max_tenant_share: the most of a tier that one tenant's blocks may take.
        num_ranks: how many must have made a copy: those that hold layers of the pool.
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
    """What the tiers of a group hold.

    Attributes:
        all: of the pool for layers that see every token.
        local: of the pool for layers that attend within their chunk.
        bytes_share: of a block below the device, over its bytes on it.
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
        """Most blocks of all tokens in host memory and on disk."""
        return self.all.host_blocks + self.all.disk_blocks


@dataclass(frozen=True, slots=True)
class PeerBlocks:
    """Blocks of one pool that another group has in its host memory.

    Attributes:
        segments: of its ranks.
        slots: by key.
    """

    segments: tuple[Segment, ...]
    slots: dict[bytes, int]

    def to_wire(self) -> list[Any]:
        """As msgpack can carry it."""
        return [[one.to_wire() for one in self.segments], self.slots]

    @classmethod
    def from_wire(cls, values: list[Any]) -> PeerBlocks:
        """Undo `to_wire`."""
        segments, slots = values
        return cls(tuple(Segment.from_wire(one) for one in segments), slots)

"""Which tier below one pool has which key: host memory, disk, the shared store, a peer's memory.

Each bounded tier retains the prefixes that requests named, within limits of its own.

Knows keys, and the order of the tiers; knows nothing of blocks on the device and of transfers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from arriero.shards.kv.blocks import CacheEvent, CacheListener
from arriero.shards.kv.index import TierIndex
from arriero.shards.kv.limits import PeerBlocks, TierLimits
from arriero.shards.kv.retention import Retention, RetentionChanges
from arriero.shards.kv.transfers import Segment, Tier, TransferResult

MOST_RECOVERED = 2000
"""Blocks from before the start indexed between two steps: some milliseconds' worth."""


class TierKeys:
    """Keys of each tier below a pool.

    Args:
        limits: limits of the tiers.
        on_event: callback for keys that host memory or disk has now ("kept"), and that neither has
            any more ("dropped").

    Attributes:
        segments: each rank's host memory, once all ranks have reported theirs.
    """

    def __init__(self, limits: TierLimits, on_event: CacheListener | None) -> None:
        self._on_event = on_event
        share = limits.max_tenant_share
        self._index: dict[Tier, TierIndex] = {}  # bounded tiers, the nearest first
        if limits.host_blocks:
            self._index[Tier.HOST] = TierIndex(limits.host_blocks, share)
        if limits.disk_blocks:
            self._index[Tier.DISK] = TierIndex(limits.disk_blocks, share)
        self._retention = {
            tier: Retention.of_capacity(index.capacity, share)
            for tier, index in self._index.items()
        }
        self._shared: set[bytes] | None = set() if limits.shared else None
        self._dropped: list[tuple[Tier, bytes]] = []
        self._recovered: deque[tuple[Tier, bytes, bool]] = deque()
        self.segments: tuple[Segment, ...] = ()

    # ---- state ----

    @property
    def has_tiers(self) -> bool:
        """Whether there is any tier."""
        return bool(self._index or self._shared is not None)

    @property
    def has_host_memory(self) -> bool:
        """Whether there is host memory; thread-safe."""
        return Tier.HOST in self._index

    @property
    def num_pending(self) -> int:
        """Keys to drop, and keys from before the start to index."""
        return len(self._dropped) + len(self._recovered)

    def counts(self) -> dict[str, int]:
        """Blocks in each tier."""
        return {
            "host": len(self._index.get(Tier.HOST, ())),
            "disk": len(self._index.get(Tier.DISK, ())),
            "shared": len(self._shared or ()),
        }

    def tenants(self) -> dict[Tier, dict[str, int]]:
        """Blocks of each bounded tier by tenant; blocks from before the start have tenant ""."""
        return {tier: index.tenants() for tier, index in self._index.items()}

    def capacities(self) -> dict[Tier, int]:
        """Most blocks of each bounded tier."""
        return {tier: index.capacity for tier, index in self._index.items()}

    # ---- questions about a key ----

    def lacks(self, tier: Tier, key: bytes) -> bool:
        """Whether a tier that exists lacks a key."""
        if tier is Tier.SHARED:
            return self._shared is not None and key not in self._shared
        return tier in self._index and key not in self._index[tier]

    def lacks_any(self, key: bytes) -> bool:
        """Whether any tier lacks a key that it should have."""
        if any(key not in index for index in self._index.values()):
            return True
        return self._shared is not None and key not in self._shared

    def missing_retained(self, chain: Sequence[bytes]) -> dict[bytes, int]:
        """Keys of a chain that a tier retains and lacks, each with its index in the chain."""
        missing: dict[bytes, int] = {}
        for index in self._index.values():
            missing |= index.missing_retained(chain)
        return missing

    def first_without(self, key: bytes) -> Tier | None:
        """The nearest tier that lacks a key; tiers that retain the key go before others.

        Host memory may retain less of a chain than the disk. A block beyond that part, saved there,
        could be evicted before it is written to the disk.
        """
        lacking = [tier for tier, index in self._index.items() if key not in index]
        if lacking:
            retaining = (tier for tier in lacking if self._index[tier].lacks_retained(key))
            return next(retaining, lacking[0])
        return Tier.SHARED if self.lacks(Tier.SHARED, key) else None

    def nearest_above(self, tier: Tier, key: bytes) -> tuple[Tier, int] | None:
        """The nearest bounded tier above `tier` that has a key, and the key's slot there."""
        for source, index in self._index.items():
            slot = index.slot(key)
            if slot is not None and source < tier:
                return source, slot
        return None

    def nearest(self, key: bytes, peer: PeerBlocks | None) -> tuple[Tier, int] | None:
        """The nearest source of a key, and the key's slot there; `peer` counts as a tier."""
        index = self._index.get(Tier.HOST)
        host = None if index is None else index.slot(key)
        if host is not None:
            return Tier.HOST, host
        if peer is not None and key in peer.slots:
            return Tier.PEER, peer.slots[key]
        disk = self._index.get(Tier.DISK)
        if disk is not None and disk.slot(key) is not None:
            return Tier.DISK, 0
        return (Tier.SHARED, 0) if self._shared and key in self._shared else None

    def in_host_memory(self, keys: Sequence[bytes]) -> PeerBlocks:
        """Slots of those keys that host memory has; thread-safe."""
        index = self._index.get(Tier.HOST)
        if index is None or not self.segments:
            return PeerBlocks((), {})
        slots = ((key, index.slot(key)) for key in keys)
        return PeerBlocks(self.segments, {key: slot for key, slot in slots if slot is not None})

    def is_arriving(self, key: bytes) -> bool:
        """Whether host memory has reserved a slot for a key and lacks the block; thread-safe."""
        index = self._index.get(Tier.HOST)
        return index is not None and key in index and index.slot(key) is None

    # ---- changes ----

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note a use of these keys, in every tier that has them."""
        for index in self._index.values():
            index.touch(keys)

    def keep(
        self,
        tenant: str,
        session: str,
        keys: Sequence[bytes],
        ends: Sequence[tuple[int, float]],
        now_s: float,
    ) -> None:
        """Retain a chain of keys in every bounded tier; see `Retention.keep`."""
        for tier, index in self._index.items():
            _apply(index, self._retention[tier].keep(tenant, session, keys, ends, now_s))

    def end_session(self, tenant: str, session: str) -> None:
        """Retain the prefixes of a session no longer."""
        for tier, index in self._index.items():
            _apply(index, self._retention[tier].release(tenant, session))

    def expire(self, now_s: float) -> None:
        """Retain the prefixes whose time has passed no longer."""
        for tier, index in self._index.items():
            _apply(index, self._retention[tier].expire(now_s))

    def reserve(self, tier: Tier, key: bytes, tenant: str, depth: int) -> int | None:
        """A slot for a key, perhaps an evicted key's; None without room. A store has slot 0."""
        if tier is Tier.SHARED:
            return 0
        reserved = self._index[tier].reserve(key, tenant, depth)
        if reserved is None:
            return None
        slot, victim = reserved
        if victim is not None:
            self._evicted(tier, victim)
        return slot

    def acquire(self, tier: Tier, key: bytes) -> None:
        """Keep a key of a bounded tier until `release`; other tiers evict nothing."""
        if tier in self._index:
            self._index[tier].acquire((key,))

    def release(self, tier: Tier, key: bytes) -> None:
        """Undo `acquire`."""
        if tier in self._index:
            self._index[tier].release((key,))

    def commit(self, tier: Tier, key: bytes) -> None:
        """A tier has the block of a key from now on."""
        if tier in self._index:
            self._index[tier].commit(key)
            self._emit("kept", key)
        elif self._shared is not None:
            self._shared.add(key)

    def abandon(self, tier: Tier, key: bytes) -> None:
        """Undo `reserve`: the block did not arrive."""
        if tier in self._index:
            self._index[tier].release((key,))
            self.discard(tier, key)

    def discard(self, tier: Tier, key: bytes) -> None:
        """Remove a key that a tier lacks after all."""
        if tier is Tier.SHARED and self._shared is not None:
            self._shared.discard(key)
        if tier in self._index:
            self._index[tier].discard(key)
            self._evicted(tier, key)

    def flush(self) -> int:
        """Drop all unused blocks of the bounded tiers; returns the number of blocks."""
        count = 0
        for tier, index in self._index.items():
            for key in [key for key in index if index.is_unused(key)]:
                index.discard(key)
                count += 1
                self._evicted(tier, key)
        return count

    def take_dropped(self) -> list[tuple[Tier, bytes]]:
        """Keys to drop from files since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _evicted(self, tier: Tier, key: bytes) -> None:
        """Report a key that a tier has removed."""
        if tier is Tier.DISK:
            self._dropped.append((tier, key))
        if all(index.slot(key) is None for index in self._index.values()):
            self._emit("dropped", key)

    def _emit(self, event: CacheEvent, key: bytes) -> None:
        if self._on_event is not None:
            self._on_event(event, key)

    # ---- blocks from before the start ----

    def open(self, reports: Sequence[TransferResult]) -> None:
        """Start with the blocks that every rank has whole; a tier that a rank lacks is closed.

        Args:
            reports: every rank's report of its tiers.
        """
        by_rank = sorted(reports, key=lambda report: report.rank)
        self.segments = tuple(r.segment for r in by_rank if r.segment is not None)
        if len(self.segments) < len(reports):
            self.segments = ()
            self._index.pop(Tier.HOST, None)
        for tier in (Tier.DISK, Tier.SHARED):
            if any(tier not in report.stored for report in reports):  # a rank cannot use it
                self._index.pop(tier, None)
                if tier is Tier.SHARED:
                    self._shared = None
                continue
            self._recover(tier, reports)
        self.index_recovered()

    def _recover(self, tier: Tier, reports: Sequence[TransferResult]) -> None:
        stored = [report.stored[tier] for report in reports]
        complete = set.intersection(*({key for key, whole in keys if whole} for keys in stored))
        known = dict.fromkeys(key for keys in stored for key, _ in keys)
        for report in reports:
            report.stored = {other: keys for other, keys in report.stored.items() if other != tier}
        if tier is Tier.SHARED:
            self._shared = complete
            return
        self._recovered.extend((tier, key, key in complete) for key in known)

    def index_recovered(self) -> None:
        """Index some of the blocks from before the start, oldest first so the newest stay."""
        for _ in range(min(len(self._recovered), MOST_RECOVERED)):
            tier, key, complete = self._recovered.popleft()
            if key in self._index[tier]:
                continue
            if not complete or self.reserve(tier, key, "", 0) is None:
                self._dropped.append((tier, key))
                continue
            self.commit(tier, key)


def _apply(index: TierIndex, changes: RetentionChanges) -> None:
    index.unretain(changes.dropped)
    index.retain(changes.added)

"""Decides which blocks of one pool go to which tier, and when: the leader's side, sans-I/O.

Each full block is saved to host memory soon after the step that computes it, and from there to
disk and to the shared store; so an eviction, from whichever tier, copies nothing. If a request's
prefix continues in a lower tier, or in a peer's memory, those blocks are loaded before the request
enters a slot.

The slices' transfer workers make the transfers beside the steps. During a transfer the block on
the device is pinned (by a table of its own), and slot and file are in use. A transfer is done when
every rank has done its part. A failure on any rank is a miss on all ranks, so that ranks never
disagree.

Knows keys, blocks and tiers; knows nothing of sequences, of other pools, of files or time.

Lifetime of a block's copy: `note` → save → `commit` → write to disk and store → evicted by
`TierIndex`; `load` → transfers → `apply` → the load's `num_left` falls to 0 → `end`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arriero.shards.kv.blocks import BlockManager, CacheEvent, CacheListener
from arriero.shards.kv.index import TierIndex
from arriero.shards.kv.limits import PeerBlocks, TierLimits
from arriero.shards.kv.transfers import Pool, Segment, Tier, Transfer, TransferBatch, TransferResult

MOST_SAVES = 256
"""Most blocks pinned for saving (an eighth of a pool, if that is less): two steps' worth."""
MOST_RECOVERED = 2000
"""Blocks from before the start indexed between two steps: some milliseconds' worth."""
MOST_WRITES = 32
"""Most blocks in flight from a tier to a lower tier."""


@dataclass(slots=True)
class Load:
    """Blocks of a chain, on the device or in flight to the device, pinned by a table.

    Attributes:
        owner: owner of the table.
        keys: keys of the table's blocks.
        first: index in the chain of the table's first block.
        num_cached: blocks that were on the device already.
        num_left: transfers in flight.
        failed: positions in the table whose transfer failed.
    """

    owner: int
    keys: list[bytes]
    first: int
    num_cached: int
    num_left: int = 0
    failed: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _InFlight:
    """A transfer in flight; `num_left` counts the ranks without a result."""

    transfer: Transfer
    num_left: int
    tenant: str
    depth: int
    failed: bool = False
    pin: int | None = None
    load: Load | None = None


class PoolOffloadManager:
    """Manages the tiers below one pool of a group.

    Args:
        limits: limits of the tiers.
        which: the pool.
        pool: blocks of the pool on the device.
        new_owner: returns a new owner of a block table.
        on_event: callback for keys that host memory or disk has now ("kept"), and that neither has
            any more ("dropped").
    """

    def __init__(
        self,
        limits: TierLimits,
        which: Pool,
        pool: BlockManager,
        new_owner: Callable[[], int],
        on_event: CacheListener | None = None,
    ) -> None:
        self._on_event = on_event
        self._which, self._pool, self._new_owner = which, pool, new_owner
        self._num_ranks = limits.num_ranks
        share = limits.max_tenant_share
        self._index: dict[Tier, TierIndex] = {}
        if limits.host_blocks:
            self._index[Tier.HOST] = TierIndex(limits.host_blocks, share)
        if limits.disk_blocks:
            self._index[Tier.DISK] = TierIndex(limits.disk_blocks, share)
        self._shared_keys: set[bytes] | None = set() if limits.shared else None
        self._ids = itertools.count()
        self._in_flight: dict[int, _InFlight] = {}
        self._to_save: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._to_write: OrderedDict[tuple[Tier, bytes], tuple[str, int]] = OrderedDict()
        self._outbox: list[TransferBatch] = []  # loads: sent first
        self._dropped: list[tuple[Tier, bytes]] = []
        self._opened: list[TransferResult] = []
        self._recovered: deque[tuple[Tier, bytes, bool]] = deque()
        self._most_saves = max(1, min(MOST_SAVES, pool.num_blocks // 8))
        self._num_loading = self._num_saves = self._num_writes = 0
        self.num_loaded = self.num_saved = self.num_failed = 0
        self.segments: tuple[Segment, ...] = ()

    # ---- state ----

    @property
    def enabled(self) -> bool:
        """Whether every rank has opened its tiers."""
        return len(self._opened) == self._num_ranks

    @property
    def num_transfers(self) -> int:
        """Transfers in flight or waiting."""
        return len(self._in_flight) + len(self._outbox) + self._num_waiting

    @property
    def _num_waiting(self) -> int:
        if not self.enabled:
            return 0
        return len(self._to_save) + len(self._to_write) + len(self._dropped) + len(self._recovered)

    def counts(self) -> dict[str, int]:
        """Blocks in each tier, and transfers since the start."""
        return {
            "host": len(self._index.get(Tier.HOST, ())),
            "disk": len(self._index.get(Tier.DISK, ())),
            "shared": len(self._shared_keys or ()),
            "loaded": self.num_loaded,
            "saved": self.num_saved,
            "failed": self.num_failed,
            "moving": self.num_transfers,
        }

    def tenants(self) -> dict[Tier, dict[str, int]]:
        """Blocks of each bounded tier by tenant; blocks from before the start have tenant ""."""
        return {tier: index.tenants() for tier, index in self._index.items()}

    def capacities(self) -> dict[Tier, int]:
        """Most blocks of each bounded tier."""
        return {tier: index.capacity for tier, index in self._index.items()}

    def shared(self, keys: Sequence[bytes]) -> PeerBlocks:
        """Blocks of these keys that another group may copy; nothing is reserved for that group.

        Thread-safe, like `is_saving`: both read single entries, and the answer may be outdated
        at once.
        """
        index = self._index.get(Tier.HOST)
        if index is None or not self.segments:
            return PeerBlocks((), {})
        slots = ((key, index.slot(key)) for key in keys)
        return PeerBlocks(self.segments, {key: slot for key, slot in slots if slot is not None})

    def is_saving(self, keys: Sequence[bytes]) -> bool:
        """Whether a transfer of any of these blocks to host memory is in flight."""
        index = self._index.get(Tier.HOST)
        if index is None:
            return False
        return any(
            key in self._to_save or (key in index and index.slot(key) is None) for key in keys
        )

    # ---- saving ----

    def note(self, keys: Sequence[bytes], first_depth: int, tenant: str) -> None:
        """Note that these blocks are on the device, computed by a plan sent or about to be."""
        if not (self._index or self._shared_keys is not None):
            return
        for depth, key in enumerate(keys, first_depth):
            if self._missing(key):
                self._to_save[key] = (tenant, depth)
        while len(self._to_save) > self._pool.num_blocks:  # the oldest were evicted already
            self._to_save.popitem(last=False)

    def _missing(self, key: bytes) -> bool:
        """Whether any tier lacks a key that it should have."""
        if any(key not in index for index in self._index.values()):
            return True
        return self._shared_keys is not None and key not in self._shared_keys

    def take_transfers(self) -> list[TransferBatch]:
        """Transfers to send to the slices now, after every plan made so far."""
        if not self.enabled:
            return []
        self._index_recovered()
        batch = TransferBatch(pool=self._which)
        while self._to_save and self._num_saves < self._most_saves:
            key, (tenant, depth) = self._to_save.popitem(last=False)
            self._save(batch, key, tenant, depth)
        while self._to_write and self._num_writes < MOST_WRITES:
            (tier, key), (tenant, depth) = self._to_write.popitem(last=False)
            self._write(batch, tier, key, tenant, depth)
        batch.dropped, self._dropped = self._dropped, []
        outbox, self._outbox = self._outbox, []
        return [*outbox, batch] if batch.transfers or batch.dropped else outbox

    def _save(self, batch: TransferBatch, key: bytes, tenant: str, depth: int) -> None:
        """Save a block from the device to the first tier that lacks the key."""
        blocks = self._pool.match((key,))
        target = next((tier for tier, index in self._index.items() if key not in index), None)
        if target is None and self._shared_keys is not None and key not in self._shared_keys:
            target = Tier.SHARED
        if not blocks or target is None:
            return
        slot = self._reserve(target, key, tenant, depth)
        if slot is None:
            return
        pin = self._new_owner()
        self._pool.allocate(pin, 1, blocks)
        self._num_saves += 1
        transfer = Transfer(next(self._ids), key, Tier.DEVICE, blocks[0], target, slot)
        self._send(batch, _InFlight(transfer, self._num_ranks, tenant, depth, pin=pin))

    def _lacks(self, tier: Tier, key: bytes) -> bool:
        if tier is Tier.SHARED:
            return self._shared_keys is not None and key not in self._shared_keys
        return tier in self._index and key not in self._index[tier]

    def _write(self, batch: TransferBatch, tier: Tier, key: bytes, tenant: str, depth: int) -> None:
        """Copy a block from one of the tiers to a lower tier, unless the key was evicted."""
        if not self._lacks(tier, key):
            return
        for source, index in self._index.items():
            source_slot = index.slot(key)
            if source_slot is None or source >= tier:
                continue
            slot = self._reserve(tier, key, tenant, depth)
            if slot is not None:
                index.acquire((key,))
                self._num_writes += 1
                transfer = Transfer(next(self._ids), key, source, source_slot, tier, slot)
                self._send(batch, _InFlight(transfer, self._num_ranks, tenant, depth))
            return

    def _reserve(self, tier: Tier, key: bytes, tenant: str, depth: int) -> int | None:
        if tier is Tier.SHARED:
            return 0
        reserved = self._index[tier].reserve(key, tenant, depth)
        if reserved is None:
            return None
        slot, victim = reserved
        if victim is not None:
            self._evicted(tier, victim)
        return slot

    def _send(self, batch: TransferBatch, flight: _InFlight) -> None:
        self._in_flight[flight.transfer.id] = flight
        batch.transfers.append(flight.transfer)

    # ---- loading ----

    def has(self, key: bytes, peer: PeerBlocks | None = None) -> bool:
        """Whether a block is on the device, or can be loaded."""
        return self._pool.holds(key) or self._nearest(key, peer) is not None

    def reach(self, keys: Sequence[bytes], spare: int, peer: PeerBlocks | None = None) -> int:
        """Number of a chain's leading blocks that are on the device or can be loaded now.

        Args:
            keys: keys of a range of the chain.
            spare: blocks that must stay available.
            peer: blocks of the chain in another group.
        """
        blocks = self._pool.match(keys)
        room = min(
            self._pool.num_available - spare - self._pool.cost(len(blocks), blocks),
            self._pool.num_blocks // 2 - self._num_loading,
        )
        reach = len(blocks)
        while reach < len(keys) and reach - len(blocks) < room:
            if self._nearest(keys[reach], peer) is None:
                break
            reach += 1
        return reach

    def load(
        self, keys: Sequence[bytes], first: int, tenant: str, peer: PeerBlocks | None = None
    ) -> Load:
        """Pin blocks that are on the device, and start loading the others.

        Args:
            keys: keys of a range of a chain, all within `reach`.
            first: index in the chain of the first block.
            tenant: tenant of the blocks.
            peer: blocks of the chain in another group.

        Returns:
            A load for `end`, to be called once `num_left` is 0.
        """
        blocks = self._pool.match(keys)
        for index in self._index.values():
            index.touch(keys)
        self.note(keys[: len(blocks)], first, tenant)  # the tiers may have dropped them meanwhile
        load = Load(self._new_owner(), list(keys), first, len(blocks), len(keys) - len(blocks))
        self._pool.allocate(load.owner, len(load.keys), blocks)
        self._num_loading += load.num_left
        batch = TransferBatch(pool=self._which, peer=() if peer is None else peer.segments)
        table = self._pool.table(load.owner)
        for position in range(len(blocks), len(keys)):
            key, source = keys[position], self._nearest(keys[position], peer)
            assert source is not None, "a load past its reach"
            tier, slot = source
            if tier in self._index:
                self._index[tier].acquire((key,))
            transfer = Transfer(next(self._ids), key, tier, slot, Tier.DEVICE, table[position])
            depth = first + position
            self._send(batch, _InFlight(transfer, self._num_ranks, tenant, depth, load=load))
        if batch.transfers:
            self._outbox.append(batch)
        return load

    def end(self, load: Load) -> None:
        """Unpin a load's blocks."""
        self._pool.free(load.owner)

    def _nearest(self, key: bytes, peer: PeerBlocks | None) -> tuple[Tier, int] | None:
        index = self._index.get(Tier.HOST)
        host = None if index is None else index.slot(key)
        if host is not None:
            return Tier.HOST, host
        if peer is not None and key in peer.slots:
            return Tier.PEER, peer.slots[key]
        disk = self._index.get(Tier.DISK)
        if disk is not None and disk.slot(key) is not None:
            return Tier.DISK, 0
        return (Tier.SHARED, 0) if self._shared_keys and key in self._shared_keys else None

    # ---- results ----

    def apply(self, result: TransferResult) -> None:
        """Apply a rank's transfer results."""
        if result.ready:
            self._opened.append(result)
            if self.enabled:
                self._open()
        for failed, ids in ((False, result.done), (True, result.failed)):
            for transfer_id in ids:
                flight = self._in_flight[transfer_id]
                flight.failed |= failed
                flight.num_left -= 1
                if not flight.num_left:
                    del self._in_flight[transfer_id]
                    self._end(flight)

    def _open(self) -> None:
        """Start with the blocks that every rank has whole, once every rank has reported."""
        by_rank = sorted(self._opened, key=lambda result: result.rank)
        self.segments = tuple(r.segment for r in by_rank if r.segment is not None)
        if len(self.segments) < self._num_ranks:
            self.segments = ()
            self._index.pop(Tier.HOST, None)
        for tier in (Tier.DISK, Tier.SHARED):
            if any(tier not in result.stored for result in self._opened):  # a rank cannot use it
                self._index.pop(tier, None)
                if tier is Tier.SHARED:
                    self._shared_keys = None
                continue
            self._recover(tier)
        self._index_recovered()

    def _recover(self, tier: Tier) -> None:
        stored = [result.stored[tier] for result in self._opened]
        complete = set.intersection(*({key for key, whole in keys if whole} for keys in stored))
        known = dict.fromkeys(key for keys in stored for key, _ in keys)
        for result in self._opened:
            result.stored = {other: keys for other, keys in result.stored.items() if other != tier}
        if tier is Tier.SHARED:
            self._shared_keys = complete
            return
        self._recovered.extend((tier, key, key in complete) for key in known)

    def _index_recovered(self) -> None:
        """Index some of the blocks from before the start, oldest first so the newest stay."""
        for _ in range(min(len(self._recovered), MOST_RECOVERED)):
            tier, key, complete = self._recovered.popleft()
            index = self._index[tier]
            if key in index:
                continue
            if not complete or self._reserve(tier, key, "", 0) is None:
                self._dropped.append((tier, key))
                continue
            index.commit(key)
            self._emit("kept", key)

    def _end(self, flight: _InFlight) -> None:
        """Finish a transfer: every rank has reported."""
        transfer = flight.transfer
        if flight.failed:
            self.num_failed += 1
        if flight.pin is not None:
            self._num_saves -= 1
            self._pool.free(flight.pin)
        elif flight.load is None:
            self._num_writes -= 1
        if transfer.source in self._index:
            self._index[transfer.source].release((transfer.key,))
        if flight.load is not None:
            self._end_load(flight.load, flight)
        else:
            self._end_save(flight)

    def _end_save(self, flight: _InFlight) -> None:
        transfer = flight.transfer
        if flight.failed:
            if transfer.target in self._index:
                self._index[transfer.target].release((transfer.key,))
                self._discard(transfer.target, transfer.key)
            return
        self.num_saved += 1
        if transfer.target in self._index:
            self._index[transfer.target].commit(transfer.key)
            self._emit("kept", transfer.key)
        elif self._shared_keys is not None:
            self._shared_keys.add(transfer.key)
        for tier in (Tier.DISK, Tier.SHARED):
            if tier > transfer.target and self._lacks(tier, transfer.key):
                self._to_write[tier, transfer.key] = (flight.tenant, flight.depth)

    def _end_load(self, load: Load, flight: _InFlight) -> None:
        transfer, position = flight.transfer, flight.depth - load.first
        load.num_left -= 1
        self._num_loading -= 1
        if flight.failed:
            load.failed.add(position)
            self._discard(transfer.source, transfer.key)
        else:
            self.num_loaded += 1
        if load.num_left:
            return
        good = load.keys[load.num_cached : min(load.failed, default=len(load.keys))]
        self._pool.store(load.owner, load.num_cached, good)
        self.note(good, load.first + load.num_cached, flight.tenant)

    def _discard(self, tier: Tier, key: bytes) -> None:
        """Remove a key that a tier lacks after all."""
        if tier is Tier.SHARED and self._shared_keys is not None:
            self._shared_keys.discard(key)
        if tier in self._index:
            self._index[tier].discard(key)
            self._evicted(tier, key)

    def _evicted(self, tier: Tier, key: bytes) -> None:
        """Report a key that a tier has removed."""
        if tier is Tier.DISK:
            self._dropped.append((tier, key))
        if all(index.slot(key) is None for index in self._index.values()):
            self._emit("dropped", key)

    def _emit(self, event: CacheEvent, key: bytes) -> None:
        if self._on_event is not None:
            self._on_event(event, key)

    def flush(self) -> int:
        """Drop all unused blocks of the tiers of this group; returns the number of blocks."""
        count = 0
        for tier, index in self._index.items():
            for key in [key for key in index if index.is_unused(key)]:
                index.discard(key)
                count += 1
                self._evicted(tier, key)
        self._to_save.clear()
        self._to_write.clear()
        return count

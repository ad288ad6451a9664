"""Decides which blocks of one pool go to which tier, and when: the leader's side, sans-I/O.

Each full block is saved to host memory soon after the step that computes it, and from there to
disk and to the shared store; so an eviction, from whichever tier, copies nothing. If a request's
prefix continues in a lower tier, or in a peer's memory, those blocks are loaded before the request
enters a slot.

The slices' transfer workers make the transfers beside the steps. During a transfer the block on
the device is pinned (by a table of its own), and slot and file are in use. A transfer is done when
every rank has done its part. A failure on any rank is a miss on all ranks, so that ranks never
disagree.

Knows blocks, transfers and limits; `TierKeys` knows which tier has which key. Knows nothing of
sequences, of other pools, of files or time.

Lifetime of a block's copy: `note` → save → `commit` → write to disk and store → evicted by
`TierIndex`; `load` → transfers → `apply` → the load's `num_left` falls to 0 → `end`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arriero.shards.kv.blocks import BlockManager, CacheListener
from arriero.shards.kv.limits import PeerBlocks, TierLimits
from arriero.shards.kv.tier_keys import TierKeys
from arriero.shards.kv.transfers import Pool, Tier, Transfer, TransferBatch, TransferResult

MOST_SAVES = 256
"""Most blocks pinned for saving (an eighth of a pool, if that is less): two steps' worth."""
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
        self._which, self._pool, self._new_owner = which, pool, new_owner
        self._num_ranks = limits.num_ranks
        self._keys = TierKeys(limits, on_event)
        self._ids = itertools.count()
        self._in_flight: dict[int, _InFlight] = {}
        self._to_save: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._to_write: OrderedDict[tuple[Tier, bytes], tuple[str, int]] = OrderedDict()
        self._outbox: list[TransferBatch] = []  # loads: sent first
        self._opened: list[TransferResult] = []
        self._most_saves = max(1, min(MOST_SAVES, pool.num_blocks // 8))
        self._num_loading = self._num_saves = self._num_writes = 0
        self.num_loaded = self.num_saved = self.num_failed = 0

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
        return len(self._to_save) + len(self._to_write) + self._keys.num_pending

    def counts(self) -> dict[str, int]:
        """Blocks in each tier, and transfers since the start."""
        return {
            **self._keys.counts(),
            "loaded": self.num_loaded,
            "saved": self.num_saved,
            "failed": self.num_failed,
            "moving": self.num_transfers,
        }

    def tenants(self) -> dict[Tier, dict[str, int]]:
        """Blocks of each bounded tier by tenant; blocks from before the start have tenant ""."""
        return self._keys.tenants()

    def capacities(self) -> dict[Tier, int]:
        """Most blocks of each bounded tier."""
        return self._keys.capacities()

    def shared(self, keys: Sequence[bytes]) -> PeerBlocks:
        """Blocks of these keys that another group may copy; nothing is reserved for that group.

        Thread-safe, like `is_saving`: both read single entries, and the answer may be outdated
        at once.
        """
        return self._keys.in_host_memory(keys)

    def is_saving(self, keys: Sequence[bytes]) -> bool:
        """Whether a transfer of any of these blocks to host memory is in flight."""
        if not self._keys.has_host_memory:
            return False
        return any(key in self._to_save or self._keys.is_arriving(key) for key in keys)

    # ---- saving ----

    def note(self, keys: Sequence[bytes], first_depth: int, tenant: str) -> None:
        """Note that these blocks are on the device, computed by a plan sent or about to be."""
        if not self._keys.has_tiers:
            return
        for depth, key in enumerate(keys, first_depth):
            if self._keys.lacks_any(key):
                self._to_save[key] = (tenant, depth)
        while len(self._to_save) > self._pool.num_blocks:  # the oldest were evicted already
            self._to_save.popitem(last=False)

    def keep(
        self,
        tenant: str,
        session: str,
        keys: Sequence[bytes],
        ends: Sequence[tuple[int, float]],
        now_s: float,
    ) -> None:
        """Retain a chain in the tiers; blocks that a tier has evicted meanwhile are saved again.

        See `Retention.keep` for the arguments.
        """
        self._keys.keep(tenant, session, keys, ends, now_s)
        for key, depth in self._keys.missing_retained(keys).items():
            self._to_save[key] = (tenant, depth)

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer."""
        self._keys.end_session(tenant, session)

    def expire(self, now_s: float) -> None:
        """Retain the blocks whose time has passed no longer."""
        self._keys.expire(now_s)

    def take_transfers(self) -> list[TransferBatch]:
        """Transfers to send to the slices now, after every plan made so far."""
        if not self.enabled:
            return []
        self._keys.index_recovered()
        batch = TransferBatch(pool=self._which)
        while self._to_save and self._num_saves < self._most_saves:
            key, (tenant, depth) = self._to_save.popitem(last=False)
            self._save(batch, key, tenant, depth)
        while self._to_write and self._num_writes < MOST_WRITES:
            (tier, key), (tenant, depth) = self._to_write.popitem(last=False)
            self._write(batch, tier, key, tenant, depth)
        batch.dropped = self._keys.take_dropped()
        outbox, self._outbox = self._outbox, []
        return [*outbox, batch] if batch.transfers or batch.dropped else outbox

    def _save(self, batch: TransferBatch, key: bytes, tenant: str, depth: int) -> None:
        """Save a block from the device to the first tier that lacks the key."""
        blocks = self._pool.match((key,))
        target = self._keys.first_without(key)
        if not blocks or target is None:
            return
        slot = self._keys.reserve(target, key, tenant, depth)
        if slot is None:
            return
        pin = self._new_owner()
        self._pool.allocate(pin, 1, blocks)
        self._num_saves += 1
        transfer = Transfer(next(self._ids), key, Tier.DEVICE, blocks[0], target, slot)
        self._send(batch, _InFlight(transfer, self._num_ranks, tenant, depth, pin=pin))

    def _write(self, batch: TransferBatch, tier: Tier, key: bytes, tenant: str, depth: int) -> None:
        """Copy a block from one of the tiers to a lower tier, unless the key was evicted."""
        source = self._keys.nearest_above(tier, key) if self._keys.lacks(tier, key) else None
        if source is None:
            return
        slot = self._keys.reserve(tier, key, tenant, depth)
        if slot is not None:
            self._keys.acquire(source[0], key)
            self._num_writes += 1
            transfer = Transfer(next(self._ids), key, *source, tier, slot)
            self._send(batch, _InFlight(transfer, self._num_ranks, tenant, depth))

    def _send(self, batch: TransferBatch, flight: _InFlight) -> None:
        self._in_flight[flight.transfer.id] = flight
        batch.transfers.append(flight.transfer)

    # ---- loading ----

    def has(self, key: bytes, peer: PeerBlocks | None = None) -> bool:
        """Whether a block is on the device, or can be loaded."""
        return self._pool.holds(key) or self._keys.nearest(key, peer) is not None

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
            if self._keys.nearest(keys[reach], peer) is None:
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
        self._keys.touch(keys)
        self.note(keys[: len(blocks)], first, tenant)  # the tiers may have dropped them meanwhile
        load = Load(self._new_owner(), list(keys), first, len(blocks), len(keys) - len(blocks))
        self._pool.allocate(load.owner, len(load.keys), blocks)
        self._num_loading += load.num_left
        batch = TransferBatch(pool=self._which, peer=() if peer is None else peer.segments)
        table = self._pool.table(load.owner)
        for position in range(len(blocks), len(keys)):
            key, source = keys[position], self._keys.nearest(keys[position], peer)
            assert source is not None, "a load past its reach"
            tier, slot = source
            self._keys.acquire(tier, key)
            transfer = Transfer(next(self._ids), key, tier, slot, Tier.DEVICE, table[position])
            depth = first + position
            self._send(batch, _InFlight(transfer, self._num_ranks, tenant, depth, load=load))
        if batch.transfers:
            self._outbox.append(batch)
        return load

    def end(self, load: Load) -> None:
        """Unpin a load's blocks."""
        self._pool.free(load.owner)

    # ---- results ----

    def apply(self, result: TransferResult) -> None:
        """Apply a rank's transfer results."""
        if result.ready:
            self._opened.append(result)
            if self.enabled:
                self._keys.open(self._opened)
        for failed, ids in ((False, result.done), (True, result.failed)):
            for transfer_id in ids:
                flight = self._in_flight[transfer_id]
                flight.failed |= failed
                flight.num_left -= 1
                if not flight.num_left:
                    del self._in_flight[transfer_id]
                    self._end(flight)

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
        self._keys.release(transfer.source, transfer.key)
        if flight.load is not None:
            self._end_load(flight.load, flight)
        else:
            self._end_save(flight)

    def _end_save(self, flight: _InFlight) -> None:
        transfer = flight.transfer
        if flight.failed:
            self._keys.abandon(transfer.target, transfer.key)
            return
        self.num_saved += 1
        self._keys.commit(transfer.target, transfer.key)
        for tier in (Tier.DISK, Tier.SHARED):
            if tier > transfer.target and self._keys.lacks(tier, transfer.key):
                self._to_write[tier, transfer.key] = (flight.tenant, flight.depth)

    def _end_load(self, load: Load, flight: _InFlight) -> None:
        transfer, position = flight.transfer, flight.depth - load.first
        load.num_left -= 1
        self._num_loading -= 1
        if flight.failed:
            load.failed.add(position)
            self._keys.discard(transfer.source, transfer.key)
        else:
            self.num_loaded += 1
        if load.num_left:
            return
        good = load.keys[load.num_cached : min(load.failed, default=len(load.keys))]
        self._pool.store(load.owner, load.num_cached, good)
        self.note(good, load.first + load.num_cached, flight.tenant)

    def flush(self) -> int:
        """Drop all unused blocks of the tiers of this group; returns the number of blocks."""
        count = self._keys.flush()
        self._to_save.clear()
        self._to_write.clear()
        return count

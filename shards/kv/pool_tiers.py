"""Which blocks of one pool go to which tier, and when: the leader's side, sans-I/O.

Each full block is saved to host memory soon after it is computed, and from there to disk and to
the shared store; so an eviction, from whichever tier, copies nothing. A request whose prefix goes
on in a lower tier, or in a peer's memory, has those blocks loaded before it enters a slot.

Copies run in the slices' movers beside the steps. While one is under way its block on the device
is pinned (by a table of its own), and its slot and file are held. A copy has been made when every
rank says so; one that any rank could not make is a miss on all of them, so that ranks never
disagree.

Knows keys, blocks and tiers; knows nothing of sequences, of other pools, of files or time.

Lifetime of a block's copy: `note` → save → `commit` → write to disk and store → evicted by
`TierIndex`; `load` → moves → `take` → the load's `left` falls to 0 → `end`.
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
"""Blocks pinned for saving at once, or an eighth of a pool that is small: two steps' worth."""
MOST_FOUND = 2000
"""Blocks found at the start that are taken between two steps: some milliseconds' worth."""
MOST_WRITES = 32
"""Blocks on their way from a tier to one further down."""


@dataclass(slots=True)
class Load:
    """Blocks of a chain, on the device or on their way there, pinned by a table.

    Attributes:
        owner: of the table.
        keys: of the table's blocks.
        first: which block of its chain the table's first one is.
        num_found: how many of them were on the device already.
        left: copies under way.
    """

    owner: int
    keys: list[bytes]
    first: int
    num_found: int
    left: int = 0
    bad: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Flight:
    """A move under way."""

    move: Transfer
    left: int
    tenant: str
    depth: int
    failed: bool = False
    pin: int | None = None
    load: Load | None = None


class PoolOffloadManager:
    """The tiers below one pool of a group.

    Args:
        limits: what they hold.
        which: the pool.
        pool: its blocks on the device.
        new_owner: gives a number that owns no table.
        on_event: told of keys that host memory or disk holds ("kept"), and that neither holds any
            more ("dropped").
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
        self._stored: set[bytes] | None = set() if limits.shared else None
        self._ids = itertools.count()
        self._flights: dict[int, _Flight] = {}
        self._to_save: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._to_write: OrderedDict[tuple[Tier, bytes], tuple[str, int]] = OrderedDict()
        self._outbox: list[TransferBatch] = []  # loads, which go first
        self._dropped: list[tuple[Tier, bytes]] = []
        self._firsts: list[TransferResult] = []
        self._found: deque[tuple[Tier, bytes, bool]] = deque()
        self._most_saves = max(1, min(MOST_SAVES, pool.num_blocks // 8))
        self._num_loading = self._num_saves = self._num_writes = 0
        self.num_loaded = self.num_saved = self.num_failed = 0
        self.segments: tuple[Segment, ...] = ()

    # ---- what there is ----

    @property
    def enabled(self) -> bool:
        """Whether every rank has opened its tiers."""
        return len(self._firsts) == self._num_ranks

    @property
    def num_moving(self) -> int:
        """Moves under way or waiting to be made."""
        return len(self._flights) + len(self._outbox) + self._num_waiting

    @property
    def _num_waiting(self) -> int:
        if not self.enabled:
            return 0
        return len(self._to_save) + len(self._to_write) + len(self._dropped) + len(self._found)

    def counts(self) -> dict[str, int]:
        """Blocks in each tier, and what was moved since the start."""
        return {
            "host": len(self._index.get(Tier.HOST, ())),
            "disk": len(self._index.get(Tier.DISK, ())),
            "shared": len(self._stored or ()),
            "loaded": self.num_loaded,
            "saved": self.num_saved,
            "failed": self.num_failed,
            "moving": self.num_moving,
        }

    def tenants(self) -> dict[Tier, dict[str, int]]:
        """Blocks of each bounded tier by tenant; those found at the start are nobody's: ""."""
        return {tier: index.tenants() for tier, index in self._index.items()}

    def capacities(self) -> dict[Tier, int]:
        """Most blocks of each bounded tier."""
        return {tier: index.capacity for tier, index in self._index.items()}

    def shared(self, keys: Sequence[bytes]) -> PeerBlocks:
        """What another group may copy of these blocks; none of them is held for it.

        From any thread, as `keeping`: both look at single entries, and what they find may be
        outdated at once.
        """
        index = self._index.get(Tier.HOST)
        if index is None or not self.segments:
            return PeerBlocks((), {})
        slots = ((key, index.slot(key)) for key in keys)
        return PeerBlocks(self.segments, {key: at for key, at in slots if at is not None})

    def keeping(self, keys: Sequence[bytes]) -> bool:
        """Whether some of these blocks are on their way to host memory."""
        index = self._index.get(Tier.HOST)
        if index is None:
            return False
        return any(
            key in self._to_save or (key in index and index.slot(key) is None) for key in keys
        )

    # ---- saving ----

    def note(self, keys: Sequence[bytes], first_depth: int, tenant: str) -> None:
        """Blocks of these keys are on the device, computed by a plan that is out or about to be."""
        if not (self._index or self._stored is not None):
            return
        for depth, key in enumerate(keys, first_depth):
            if self._missing(key):
                self._to_save[key] = (tenant, depth)
        while len(self._to_save) > self._pool.num_blocks:  # the oldest have left the device
            self._to_save.popitem(last=False)

    def _missing(self, key: bytes) -> bool:
        """Whether some tier that should hold a key does not."""
        if any(key not in index for index in self._index.values()):
            return True
        return self._stored is not None and key not in self._stored

    def take_moves(self) -> list[TransferBatch]:
        """What is to be sent to the slices now, after every plan made so far."""
        if not self.enabled:
            return []
        self._take_found()
        moves = TransferBatch(pool=self._which)
        while self._to_save and self._num_saves < self._most_saves:
            key, (tenant, depth) = self._to_save.popitem(last=False)
            self._save(moves, key, tenant, depth)
        while self._to_write and self._num_writes < MOST_WRITES:
            (tier, key), (tenant, depth) = self._to_write.popitem(last=False)
            self._write(moves, tier, key, tenant, depth)
        moves.dropped, self._dropped = self._dropped, []
        outbox, self._outbox = self._outbox, []
        return [*outbox, moves] if moves.moves or moves.dropped else outbox

    def _save(self, moves: TransferBatch, key: bytes, tenant: str, depth: int) -> None:
        """From the device to the first tier that lacks it."""
        found = self._pool.match((key,))
        target = next((tier for tier, index in self._index.items() if key not in index), None)
        if target is None and self._stored is not None and key not in self._stored:
            target = Tier.SHARED
        if not found or target is None:
            return
        at = self._reserve(target, key, tenant, depth)
        if at is None:
            return
        pin = self._new_owner()
        self._pool.allocate(pin, 1, found)
        self._num_saves += 1
        move = Transfer(next(self._ids), key, Tier.DEVICE, found[0], target, at)
        self._send(moves, _Flight(move, self._num_ranks, tenant, depth, pin=pin))

    def _lacks(self, tier: Tier, key: bytes) -> bool:
        if tier is Tier.SHARED:
            return self._stored is not None and key not in self._stored
        return tier in self._index and key not in self._index[tier]

    def _write(self, moves: TransferBatch, tier: Tier, key: bytes, tenant: str, depth: int) -> None:
        """From one of our tiers to one further down; a key that is gone is left."""
        if not self._lacks(tier, key):
            return
        for source, index in self._index.items():
            slot = index.slot(key)
            if slot is None or source >= tier:
                continue
            at = self._reserve(tier, key, tenant, depth)
            if at is not None:
                index.hold((key,))
                self._num_writes += 1
                move = Transfer(next(self._ids), key, source, slot, tier, at)
                self._send(moves, _Flight(move, self._num_ranks, tenant, depth))
            return

    def _reserve(self, tier: Tier, key: bytes, tenant: str, depth: int) -> int | None:
        if tier is Tier.SHARED:
            return 0
        got = self._index[tier].reserve(key, tenant, depth)
        if got is None:
            return None
        slot, victim = got
        if victim is not None:
            self._gone(tier, victim)
        return slot

    def _send(self, moves: TransferBatch, flight: _Flight) -> None:
        self._flights[flight.move.id] = flight
        moves.moves.append(flight.move)

    # ---- loading ----

    def has(self, key: bytes, peer: PeerBlocks | None = None) -> bool:
        """Whether a block is on the device, or can be brought there."""
        return self._pool.holds(key) or self._nearest(key, peer) is not None

    def reach(self, keys: Sequence[bytes], spare: int, peer: PeerBlocks | None = None) -> int:
        """How many of a chain's leading blocks are on the device or can be brought there now.

        Args:
            keys: of a stretch of the chain.
            spare: blocks that must stay available.
            peer: what another group has of it.
        """
        found = self._pool.match(keys)
        room = min(
            self._pool.num_available - spare - self._pool.cost(len(found), found),
            self._pool.num_blocks // 2 - self._num_loading,
        )
        reach = len(found)
        while reach < len(keys) and reach - len(found) < room:
            if self._nearest(keys[reach], peer) is None:
                break
            reach += 1
        return reach

    def load(
        self, keys: Sequence[bytes], first: int, tenant: str, peer: PeerBlocks | None = None
    ) -> Load:
        """Pin blocks that are on the device, and begin to bring up the others.

        Args:
            keys: of a stretch of a chain, all of it within `reach`.
            first: which block of its chain the stretch begins with.
            tenant: whose they are.
            peer: what another group has of it.

        Returns:
            What is to be given back to `end`, once its `left` is 0.
        """
        found = self._pool.match(keys)
        for index in self._index.values():
            index.touch(keys)
        self.note(keys[: len(found)], first, tenant)  # the tiers may have dropped them since
        load = Load(self._new_owner(), list(keys), first, len(found), len(keys) - len(found))
        self._pool.allocate(load.owner, len(load.keys), found)
        self._num_loading += load.left
        moves = TransferBatch(pool=self._which, peer=() if peer is None else peer.segments)
        table = self._pool.table(load.owner)
        for place in range(len(found), len(keys)):
            key, where = keys[place], self._nearest(keys[place], peer)
            assert where is not None, "a load past its reach"
            tier, at = where
            if tier in self._index:
                self._index[tier].hold((key,))
            move = Transfer(next(self._ids), key, tier, at, Tier.DEVICE, table[place])
            self._send(moves, _Flight(move, self._num_ranks, tenant, first + place, load=load))
        if moves.moves:
            self._outbox.append(moves)
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
        return (Tier.SHARED, 0) if self._stored and key in self._stored else None

    # ---- what came of it ----

    def take(self, moved: TransferResult) -> None:
        """Hear from a rank."""
        if moved.ready:
            self._firsts.append(moved)
            if self.enabled:
                self._open()
        for failed, ids in ((False, moved.done), (True, moved.failed)):
            for move_id in ids:
                flight = self._flights[move_id]
                flight.failed |= failed
                flight.left -= 1
                if not flight.left:
                    del self._flights[move_id]
                    self._end(flight)

    def _open(self) -> None:
        """Every rank has said what it found: a block counts that all of them have whole."""
        segments = [one.segment for one in sorted(self._firsts, key=lambda one: one.rank)]
        self.segments = tuple(one for one in segments if one is not None)
        if len(self.segments) < self._num_ranks:
            self.segments = ()
            self._index.pop(Tier.HOST, None)
        for tier in (Tier.DISK, Tier.SHARED):
            if any(tier not in one.found for one in self._firsts):  # some rank cannot use it
                self._index.pop(tier, None)
                if tier is Tier.SHARED:
                    self._stored = None
                continue
            self._recover(tier)
        self._take_found()

    def _recover(self, tier: Tier) -> None:
        whole = [{key for key, all_there in one.found[tier] if all_there} for one in self._firsts]
        everywhere = set.intersection(*whole)
        known = dict.fromkeys(key for one in self._firsts for key, _ in one.found[tier])
        for one in self._firsts:
            one.found = {other: keys for other, keys in one.found.items() if other is not tier}
        if tier is Tier.SHARED:
            self._stored = everywhere
            return
        self._found.extend((tier, key, key in everywhere) for key in known)

    def _take_found(self) -> None:
        """Take some of the blocks that were found at the start, oldest first so the newest stay."""
        for _ in range(min(len(self._found), MOST_FOUND)):
            tier, key, whole = self._found.popleft()
            index = self._index[tier]
            if key in index:
                continue
            if not whole or self._reserve(tier, key, "", 0) is None:
                self._dropped.append((tier, key))
                continue
            index.commit(key)
            self._tell("kept", key)

    def _end(self, flight: _Flight) -> None:
        """Every rank has answered."""
        move = flight.move
        if flight.failed:
            self.num_failed += 1
        if flight.pin is not None:
            self._num_saves -= 1
            self._pool.free(flight.pin)
        elif flight.load is None:
            self._num_writes -= 1
        if move.source in self._index:
            self._index[move.source].release((move.key,))
        if flight.load is not None:
            self._end_load(flight.load, flight)
        else:
            self._end_save(flight)

    def _end_save(self, flight: _Flight) -> None:
        move = flight.move
        if flight.failed:
            if move.target in self._index:
                self._index[move.target].release((move.key,))
                self._forget(move.target, move.key)
            return
        self.num_saved += 1
        if move.target in self._index:
            self._index[move.target].commit(move.key)
            self._tell("kept", move.key)
        elif self._stored is not None:
            self._stored.add(move.key)
        for tier in (Tier.DISK, Tier.SHARED):
            if tier > move.target and self._lacks(tier, move.key):
                self._to_write[tier, move.key] = (flight.tenant, flight.depth)

    def _end_load(self, load: Load, flight: _Flight) -> None:
        move, place = flight.move, flight.depth - load.first
        load.left -= 1
        self._num_loading -= 1
        if flight.failed:
            load.bad.add(place)
            self._forget(move.source, move.key)
        else:
            self.num_loaded += 1
        if load.left:
            return
        good = load.keys[load.num_found : min(load.bad, default=len(load.keys))]
        self._pool.store(load.owner, load.num_found, good)
        self.note(good, load.first + load.num_found, flight.tenant)

    def _forget(self, tier: Tier, key: bytes) -> None:
        """A tier has not what we thought."""
        if tier is Tier.SHARED and self._stored is not None:
            self._stored.discard(key)
        if tier in self._index:
            self._index[tier].discard(key)
            self._gone(tier, key)

    def _gone(self, tier: Tier, key: bytes) -> None:
        """A tier has given a key up."""
        if tier is Tier.DISK:
            self._dropped.append((tier, key))
        if all(index.slot(key) is None for index in self._index.values()):
            self._tell("dropped", key)

    def _tell(self, event: CacheEvent, key: bytes) -> None:
        if self._on_event is not None:
            self._on_event(event, key)

    def flush(self) -> int:
        """Forget what the lower tiers of this group hold, but for what is in use; how many."""
        count = 0
        for tier, index in self._index.items():
            for key in [key for key in index if index.idle(key)]:
                index.discard(key)
                count += 1
                self._gone(tier, key)
        self._to_save.clear()
        self._to_write.clear()
        return count

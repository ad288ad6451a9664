"""The tiers of a group: of the pool for all tokens, and of the chunk-local one where there is one.

A prefix that is brought up needs its blocks of all tokens, and of layers that see a part those
that its next token sees, no others: of the chunk that it cuts, or of the window and the sinks.
With windows the only pool is of such layers.

Knows the pools' tiers and which blocks are seen; knows nothing of sequences, files or time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from arriero.shards.kv.blocks import BlockManager, CacheListener
from arriero.shards.kv.limits import GroupTierLimits, PeerBlocks
from arriero.shards.kv.local_blocks import LocalBlocks
from arriero.shards.kv.pool_tiers import Load, PoolOffloadManager
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult


@dataclass(slots=True)
class PrefixLoad:
    """A prefix on its way to the device: a load of each pool."""

    parts: list[tuple[PoolOffloadManager, Load]]

    @property
    def left(self) -> int:
        """Copies under way."""
        return sum(load.left for _, load in self.parts)


class OffloadManager:
    """What one group keeps below the device.

    Args:
        limits: of both pools' tiers.
        pools: the blocks on the device; `Pool.LOCAL` is beside `Pool.ALL`, if at all.
        local: how the last of these is held, where its layers see a part.
        new_owner: gives a number that owns no table.
        on_event: told what becomes of blocks of `Pool.ALL` below the device.
    """

    def __init__(
        self,
        limits: GroupTierLimits,
        pools: Mapping[Pool, BlockManager],
        local: LocalBlocks | None,
        new_owner: Callable[[], int],
        on_event: CacheListener | None = None,
    ) -> None:
        self._each = [
            PoolOffloadManager(limits.all, Pool.ALL, pools[Pool.ALL], new_owner, on_event)
        ]
        if Pool.LOCAL in pools:
            self._each.append(
                PoolOffloadManager(limits.local, Pool.LOCAL, pools[Pool.LOCAL], new_owner)
            )
        self._local = local
        self._sees_all = local is None or len(pools) > 1  # some layers do
        self._on = limits.enabled
        self.num_answers = 0

    @property
    def enabled(self) -> bool:
        """Whether there are tiers, and every rank has opened its own."""
        return self._on and all(one.enabled for one in self._each)

    @property
    def num_moving(self) -> int:
        """Moves under way or waiting to be made; the tiers' opening counts as one."""
        if not self._on:
            return 0
        return sum(one.num_moving for one in self._each) + (not self.enabled)

    def counts(self) -> dict[str, int]:
        """Blocks in each tier, and what was moved since the start; of both pools together.

        Empty until the tiers are open.
        """
        if not self.enabled:
            return {}
        each = [one.counts() for one in self._each]
        return {name: sum(one[name] for one in each) for name in each[0]}

    def capacities(self) -> dict[str, int]:
        """Most blocks of each bounded tier, of both pools together."""
        total = Counter[str]()
        for one in self._each:
            total.update({tier.name.lower(): n for tier, n in one.capacities().items()})
        return dict(total)

    def tenants(self) -> dict[str, dict[str, int]]:
        """Blocks of each bounded tier by tenant; those found at the start are nobody's: ""."""
        total: dict[str, Counter[str]] = {}
        for one in self._each:
            for tier, held in one.tenants().items():
                total.setdefault(tier.name.lower(), Counter()).update(held)
        return {tier: dict(held) for tier, held in total.items()}

    def note(self, pool: Pool, keys: Sequence[bytes], first: int, tenant: str) -> None:
        """Blocks of a pool are on the device, computed by a plan that is out or about to be.

        Args:
            pool: which.
            keys: of the blocks.
            first: which block of its chain the first one is.
            tenant: whose they are.
        """
        if self._on:
            self._each[pool].note(keys, first, tenant)

    def take_moves(self) -> list[TransferBatch]:
        """What is to be sent to the slices now, after every plan made so far."""
        return [moves for one in self._each for moves in one.take_moves()] if self._on else []

    def take(self, moved: TransferResult) -> None:
        """Hear from a rank."""
        self.num_answers += 1
        self._each[moved.pool].take(moved)

    def shared(self, keys: Sequence[bytes]) -> dict[Pool, PeerBlocks]:
        """What another group may copy of these blocks, by pool; from any thread."""
        if not self.enabled:
            return {}
        return {Pool(i): one.shared(keys) for i, one in enumerate(self._each)}

    def keeping(self, keys: Sequence[bytes]) -> bool:
        """Whether some of these blocks are on their way to host memory; from any thread."""
        return self.enabled and any(one.keeping(keys) for one in self._each)

    def begin(
        self,
        keys: Sequence[bytes],
        spare: int,
        tenant: str,
        peer: Mapping[Pool, PeerBlocks] = MappingProxyType({}),
    ) -> PrefixLoad | None:
        """Begin to bring a chain's blocks to the device, as far as some tier holds them.

        Args:
            keys: of the chain, from its first block.
            spare: blocks that must stay available in each pool.
            tenant: whose they are.
            peer: what another group has of them.

        Returns:
            None when no tier has more than the device, or there is no room; else what is to be
            given back to `end`, once its `left` is 0.
        """
        if not self.enabled:
            return None
        full, count = self._each[0], len(keys)
        stretches: list[tuple[int, int]] = []
        if self._sees_all:
            count = full.reach(keys, spare, peer.get(Pool.ALL))
        pool = Pool(len(self._each) - 1)
        seen, offer = self._each[pool], peer.get(pool)
        if self._local is not None:
            count = self._local.longest(keys[:count], lambda key: seen.has(key, offer))
            count, stretches = self._stretches(keys, count, spare, offer)
        parts = []
        if self._sees_all:
            parts.append((full, full.load(keys[:count], 0, tenant, peer.get(Pool.ALL))))
        for first, end in stretches:
            parts.append((seen, seen.load(keys[first:end], first, tenant, offer)))
        load = PrefixLoad(parts)
        if load.left:
            return load
        self.end(load)
        return None

    def _stretches(
        self, keys: Sequence[bytes], count: int, spare: int, offer: PeerBlocks | None
    ) -> tuple[int, list[tuple[int, int]]]:
        """How much of a prefix of `count` blocks can come, and which of its blocks that takes.

        Where room lacks, a chunk may be cut short; a window may not, since it would reach back
        further.
        """
        assert self._local is not None, "asked of layers that see a part"
        seen, tiers = self._local.seen, self._each[-1]
        first = seen.first(count)
        sinks = min(seen.sinks, first)
        end = first + tiers.reach(keys[first:count], spare + sinks, offer)
        if seen.visible.window and (end < count or tiers.reach(keys[:sinks], spare, offer) < sinks):
            return 0, []
        return end, [one for one in ((0, sinks), (first, end)) if one[0] < one[1]]

    def end(self, load: PrefixLoad) -> None:
        """Unpin a load's blocks; those that came can be found in their pools."""
        for tiers, part in load.parts:
            tiers.end(part)

    def flush(self) -> int:
        """Forget what the tiers hold, but for what is in use; gives how many blocks."""
        return sum(one.flush() for one in self._each) if self._on else 0

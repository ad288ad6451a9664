"""Tiers of a group: below the pool of full attention, and below the chunk-local pool, if any.

Loading a prefix takes all its blocks of layers with full attention. Of layers with chunked or
windowed attention it takes only the blocks that the next token sees: those of the current chunk,
or of the window and the sinks. With a window the only pool is of such layers.

Knows the pools' tiers and the blocks that a token sees; knows nothing of sequences, files or time.
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
    """Loading of a prefix to the device: the loads of each pool."""

    loads: list[tuple[PoolOffloadManager, Load]]

    @property
    def num_left(self) -> int:
        """Transfers in flight."""
        return sum(load.num_left for _, load in self.loads)


class OffloadManager:
    """Manages the blocks of one group below the device.

    Args:
        limits: limits of both pools' tiers.
        pools: blocks on the device; `Pool.LOCAL` only beside `Pool.ALL`.
        local: tables of the last pool, if its layers have chunked or windowed attention.
        new_owner: returns a new owner of a block table.
        on_event: callback for blocks of `Pool.ALL` kept in and dropped from tiers below the device.
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
        self._sees_all = local is None or len(pools) > 1  # whether some layers have full attention
        self._configured = limits.enabled
        self.num_results = 0

    @property
    def enabled(self) -> bool:
        """Whether there are tiers, and every rank has opened its tiers."""
        return self._configured and all(tiers.enabled for tiers in self._each)

    @property
    def num_transfers(self) -> int:
        """Transfers in flight or waiting; the opening of the tiers counts as one."""
        if not self._configured:
            return 0
        return sum(tiers.num_transfers for tiers in self._each) + (not self.enabled)

    def counts(self) -> dict[str, int]:
        """Blocks in each tier, and transfers since the start; sum of both pools.

        Empty until the tiers are open.
        """
        if not self.enabled:
            return {}
        each = [tiers.counts() for tiers in self._each]
        return {name: sum(counts[name] for counts in each) for name in each[0]}

    def capacities(self) -> dict[str, int]:
        """Most blocks of each bounded tier, sum of both pools."""
        total = Counter[str]()
        for tiers in self._each:
            total.update({tier.name.lower(): n for tier, n in tiers.capacities().items()})
        return dict(total)

    def tenants(self) -> dict[str, dict[str, int]]:
        """Blocks of each bounded tier by tenant; blocks from before the start have tenant ""."""
        total: dict[str, Counter[str]] = {}
        for tiers in self._each:
            for tier, counts in tiers.tenants().items():
                total.setdefault(tier.name.lower(), Counter()).update(counts)
        return {tier: dict(counts) for tier, counts in total.items()}

    def note(self, pool: Pool, keys: Sequence[bytes], first: int, tenant: str) -> None:
        """Note that blocks of a pool are on the device, computed by a plan sent or about to be.

        Args:
            pool: pool of the blocks.
            keys: keys of the blocks.
            first: index of the first block in its chain.
            tenant: tenant of the blocks.
        """
        if self._configured:
            self._each[pool].note(keys, first, tenant)

    def keep(
        self,
        tenant: str,
        session: str,
        keys: Sequence[bytes],
        ends: Sequence[tuple[int, float]],
        now_s: float,
    ) -> None:
        """Evict a chain's blocks after all others, in every tier; see `Retention.keep`."""
        if self._configured:
            for tiers in self._each:
                tiers.keep(tenant, session, keys, ends, now_s)

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer."""
        if self._configured:
            for tiers in self._each:
                tiers.release(tenant, session)

    def expire(self, now_s: float) -> None:
        """Retain the blocks whose time has passed no longer."""
        if self._configured:
            for tiers in self._each:
                tiers.expire(now_s)

    def take_transfers(self) -> list[TransferBatch]:
        """Transfers to send to the slices now, after every plan made so far."""
        if not self._configured:
            return []
        return [batch for tiers in self._each for batch in tiers.take_transfers()]

    def apply(self, result: TransferResult) -> None:
        """Apply a rank's transfer results."""
        self.num_results += 1
        self._each[result.pool].apply(result)

    def shared(self, keys: Sequence[bytes]) -> dict[Pool, PeerBlocks]:
        """Blocks of these keys that another group may copy, by pool; thread-safe."""
        if not self.enabled:
            return {}
        return {Pool(i): tiers.shared(keys) for i, tiers in enumerate(self._each)}

    def is_saving(self, keys: Sequence[bytes]) -> bool:
        """Whether a transfer of any of these blocks to host memory is in flight; thread-safe."""
        return self.enabled and any(tiers.is_saving(keys) for tiers in self._each)

    def begin(
        self,
        keys: Sequence[bytes],
        spare: int,
        tenant: str,
        peer: Mapping[Pool, PeerBlocks] = MappingProxyType({}),
    ) -> PrefixLoad | None:
        """Start loading a chain's blocks to the device, as far as some tier has them.

        Args:
            keys: keys of the chain, from the first block.
            spare: blocks that must stay available in each pool.
            tenant: tenant of the blocks.
            peer: blocks of the chain in another group.

        Returns:
            None when no tier has more than the device, or there is no room; else a load for `end`,
            to be called once `num_left` is 0.
        """
        if not self.enabled:
            return None
        full, count = self._each[0], len(keys)
        ranges: list[tuple[int, int]] = []
        if self._sees_all:
            count = full.reach(keys, spare, peer.get(Pool.ALL))
        pool = Pool(len(self._each) - 1)
        seen, offer = self._each[pool], peer.get(pool)
        if self._local is not None:
            count = self._local.longest(keys[:count], lambda key: seen.has(key, offer))
            count, ranges = self._ranges_to_load(keys, count, spare, offer)
        loads = []
        if self._sees_all:
            loads.append((full, full.load(keys[:count], 0, tenant, peer.get(Pool.ALL))))
        for first, end in ranges:
            loads.append((seen, seen.load(keys[first:end], first, tenant, offer)))
        load = PrefixLoad(loads)
        if load.num_left:
            return load
        self.end(load)
        return None

    def _ranges_to_load(
        self, keys: Sequence[bytes], count: int, spare: int, offer: PeerBlocks | None
    ) -> tuple[int, list[tuple[int, int]]]:
        """Loadable length of a prefix of at most `count` blocks, and ranges of blocks to load.

        Without enough room a chunk may be cut short. A window may not: a shorter prefix needs
        blocks further back.
        """
        assert self._local is not None, "only for chunked or windowed attention"
        seen, tiers = self._local.seen, self._each[-1]
        first = seen.first(count)
        sinks = min(seen.sinks, first)
        end = first + tiers.reach(keys[first:count], spare + sinks, offer)
        if seen.visible.window and (end < count or tiers.reach(keys[:sinks], spare, offer) < sinks):
            return 0, []
        return end, [(start, stop) for start, stop in ((0, sinks), (first, end)) if start < stop]

    def end(self, load: PrefixLoad) -> None:
        """Unpin a load's blocks; loaded blocks are in the prefix cache of their pools."""
        for tiers, part in load.loads:
            tiers.end(part)

    def flush(self) -> int:
        """Drop all unused blocks of the tiers; returns the number of blocks."""
        return sum(tiers.flush() for tiers in self._each) if self._configured else 0

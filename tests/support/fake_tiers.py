"""Tiers that do all that may go wrong: late, out of order, lost, full, spoilt, at one rank.

They copy what `FakeSlice` stores in blocks, so a copy taken or laid down at a wrong moment changes
the tokens.
"""

from __future__ import annotations

import random

from arriero.shards.engine.types import EngineConfig
from arriero.shards.kv.transfers import (
    Pool,
    Segment,
    Tier,
    Transfer,
    TransferBatch,
    TransferResult,
)
from arriero.shards.protocol import wire
from support.fake_slice import FakeExecutor

Content = list[tuple[int, int]]
MEMORY = Segment(
    pid=1, fd=3, name="", host="", layers=(0, 1), heads=(0, 1), block=(4, 1, 1), slots=0
)
"""Says that a rank has host memory; no peer reads it."""


class FaultyTiers(FakeExecutor):
    """A `FakeExecutor` whose ranks copy blocks at moments of the test's choice.

    Args:
        config: of the engine.
        rng: decides what goes wrong.
        faults: how often, 0 to 1.
        disk: what an earlier group left on it.
    """

    def __init__(
        self,
        config: EngineConfig,
        rng: random.Random,
        faults: float,
        disk: dict[tuple[Pool, bytes], Content] | None = None,
    ) -> None:
        super().__init__(config)
        self.rng, self.faults = rng, faults
        self.disk = {} if disk is None else disk
        self.host: dict[tuple[Pool, int], tuple[bytes, Content]] = {}
        self.waiting: dict[Pool, list[Transfer]] = {pool: [] for pool in Pool}
        self.ranks = {
            Pool.ALL: config.tiers.all.num_ranks,
            Pool.LOCAL: config.tiers.local.num_ranks,
        }
        self.busy: set[tuple[Pool, Tier, object]] = set()
        pools = [Pool.ALL, Pool.LOCAL] if config.attention_chunk else [Pool.ALL]
        for pool in pools:
            stored = [key for of, key in self.disk if of is pool]
            for rank in range(self.ranks[pool]):
                listed = [(key, rng.random() >= faults) for key in stored]
                self.transfer_results.append(
                    TransferResult(
                        rank, pool, ready=True, stored={Tier.DISK: listed}, segment=MEMORY
                    )
                )

    def transfer(self, batch: TransferBatch) -> None:
        batch = wire.decode(wire.encode(batch), TransferBatch)
        for tier, key in batch.dropped:
            assert tier is Tier.DISK
            self.disk.pop((batch.pool, key), None)
        for transfer in batch.transfers:
            for place in self._places(batch.pool, transfer):
                assert place not in self.busy, f"two copies to {place} at once"
            self.busy |= set(self._places(batch.pool, transfer))
            self.waiting[batch.pool].append(transfer)

    @staticmethod
    def _places(pool: Pool, transfer: Transfer) -> list[tuple[Pool, Tier, object]]:
        at: object = transfer.key if transfer.target is Tier.DISK else transfer.target_index
        return [(pool, transfer.target, at)]

    def work(self, most: int = 4) -> bool:
        """Make some of the waiting transfers, in any order; False when none is left."""
        for pool in Pool:
            for _ in range(most):
                if not self.waiting[pool]:
                    break
                transfer = self.waiting[pool].pop(self.rng.randrange(len(self.waiting[pool])))
                self.busy -= set(self._places(pool, transfer))
                self._do(pool, transfer)
        return any(self.waiting.values())

    def _do(self, pool: Pool, transfer: Transfer) -> None:
        device = self.slice.kv if pool is Pool.ALL else self.slice.local
        failed = self.rng.random() < self.faults
        data: Content | None = None
        if transfer.source is Tier.DEVICE:
            data = list(device[transfer.source_index])
        elif transfer.source is Tier.HOST:
            key, data = self.host.get((pool, transfer.source_index), (b"", []))
            assert key == transfer.key, "host memory was given away while it was read"
        else:
            data = self.disk.get((pool, transfer.key))
        if failed or data is None:
            if transfer.target is Tier.DEVICE:  # some ranks have copied, all must be ignored
                device[transfer.target_index] = [(-7, -7)] * self.slice.config.block_size
            outcomes = [self.rng.random() < 0.5 for _ in range(self.ranks[pool])]
            outcomes[self.rng.randrange(len(outcomes))] = True
        else:
            outcomes = [False] * self.ranks[pool]
            if transfer.target is Tier.DEVICE:
                device[transfer.target_index] = list(data)
            elif transfer.target is Tier.HOST:
                self.host[pool, transfer.target_index] = (transfer.key, data)
            else:
                self.disk[pool, transfer.key] = data
        for rank, bad in enumerate(outcomes):
            done, lost = ([], [transfer.id]) if bad else ([transfer.id], [])
            result = TransferResult(rank, pool, done=done, failed=lost)
            self.transfer_results.append(wire.decode(wire.encode(result), TransferResult))

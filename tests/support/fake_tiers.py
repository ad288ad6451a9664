"""Tiers that do all that may go wrong: late, out of order, lost, full, spoilt, at one rank.

They copy what `FakeSlice` stores in blocks, so a copy taken or laid down at a wrong moment changes
the tokens.
"""

from __future__ import annotations

import random

from arriero.shards.engine.types import EngineConfig
from arriero.shards.kv.transfers import Pool, Tier, Transfer, TransferBatch, TransferResult
from support.fake_slice import FakeExecutor

Content = list[tuple[int, int]]


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
        self.due: dict[Pool, list[Transfer]] = {pool: [] for pool in Pool}
        self.ranks = {
            Pool.ALL: config.tiers.all.num_ranks,
            Pool.LOCAL: config.tiers.local.num_ranks,
        }
        self.busy: set[tuple[Pool, Tier, object]] = set()
        pools = [Pool.ALL, Pool.LOCAL] if config.attention_chunk else [Pool.ALL]
        for pool in pools:
            found = [key for of, key in self.disk if of is pool]
            for rank in range(self.ranks[pool]):
                listed = [(key, rng.random() >= faults) for key in found]
                self.said.append(TransferResult(rank, pool, ready=True, found={Tier.DISK: listed}))

    def move(self, moves: TransferBatch) -> None:
        moves = TransferBatch.from_bytes(moves.to_bytes())
        for tier, key in moves.dropped:
            assert tier is Tier.DISK
            self.disk.pop((moves.pool, key), None)
        for move in moves.moves:
            for place in self._places(moves.pool, move):
                assert place not in self.busy, f"two copies to {place} at once"
            self.busy |= set(self._places(moves.pool, move))
            self.due[moves.pool].append(move)

    @staticmethod
    def _places(pool: Pool, move: Transfer) -> list[tuple[Pool, Tier, object]]:
        at: object = move.key if move.target is Tier.DISK else move.target_at
        return [(pool, move.target, at)]

    def work(self, most: int = 4) -> bool:
        """Make some of the copies that are due, in any order; False when none is."""
        for pool in Pool:
            for _ in range(most):
                if not self.due[pool]:
                    break
                move = self.due[pool].pop(self.rng.randrange(len(self.due[pool])))
                self.busy -= set(self._places(pool, move))
                self._do(pool, move)
        return any(self.due.values())

    def _do(self, pool: Pool, move: Transfer) -> None:
        device = self.slice.kv if pool is Pool.ALL else self.slice.local
        failed = self.rng.random() < self.faults
        data: Content | None = None
        if move.source is Tier.DEVICE:
            data = list(device[move.source_at])
        elif move.source is Tier.HOST:
            key, data = self.host.get((pool, move.source_at), (b"", []))
            assert key == move.key, "host memory was given away while it was read"
        else:
            data = self.disk.get((pool, move.key))
        if failed or data is None:
            if move.target is Tier.DEVICE:  # some ranks have copied, all must be ignored
                device[move.target_at] = [(-7, -7)] * self.slice.config.block_size
            outcomes = [self.rng.random() < 0.5 for _ in range(self.ranks[pool])]
            outcomes[self.rng.randrange(len(outcomes))] = True
        else:
            outcomes = [False] * self.ranks[pool]
            if move.target is Tier.DEVICE:
                device[move.target_at] = list(data)
            elif move.target is Tier.HOST:
                self.host[pool, move.target_at] = (move.key, data)
            else:
                self.disk[pool, move.key] = data
        for rank, bad in enumerate(outcomes):
            done, lost = ([], [move.id]) if bad else ([move.id], [])
            said = TransferResult(rank, pool, done=done, failed=lost)
            self.said.append(TransferResult.from_bytes(said.to_bytes()))

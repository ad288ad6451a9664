"""Blocks of the layers that attend within their chunk: of each sequence, its chunk's and no more.

A token at position p sees the keys from p // chunk * chunk on, so blocks before that go back to
their pool. A prefix hit needs the blocks of the last chunk that it cuts, and none before: a hit
that ends on a chunk's boundary needs none at all.

Knows chunks and blocks; knows nothing of sequences, of the other pool, or of who goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.shards.engine.blocks import BlockManager


@dataclass(slots=True)
class _Held:
    """What an owner's table holds, in blocks of its sequence.

    Attributes:
        first: index of the table's first block.
        stored: blocks before this index have been offered to the cache.
    """

    first: int
    stored: int


class LocalBlocks:
    """The chunk-local pool.

    Args:
        num_blocks: of the pool.
        block_size: tokens in a block.
        chunk: tokens of a chunk; a multiple of `block_size`.

    Attributes:
        pool: the blocks themselves.
    """

    def __init__(self, num_blocks: int, block_size: int, chunk: int) -> None:
        assert chunk % block_size == 0, "a block lies in one chunk"
        self.pool = BlockManager(num_blocks, block_size)
        self._size = block_size
        self._per_chunk = chunk // block_size
        self._held: dict[int, _Held] = {}

    def first_seen(self, block: int) -> int:
        """The first block that a token in block number `block` of a sequence sees."""
        return block // self._per_chunk * self._per_chunk

    def end(self, owner: int) -> int:
        """Blocks of the sequence up to the end of an owner's table."""
        return self._held[owner].first + len(self.pool.table(owner))

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that go with the longest prefix of `keys` of which the last chunk can be found.

        Their number is not the prefix's: that is `first_seen(len(keys))` more.
        """
        return self.pool.match(keys[self.first_seen(len(keys)) :])

    def open(self, owner: int, first: int, shared: Sequence[int]) -> None:
        """Open a table on `shared` blocks, of which the first is number `first`."""
        self.pool.allocate(owner, len(shared), shared)
        self._held[owner] = _Held(first, first + len(shared))

    def seen(self, owner: int, end: int) -> list[int]:
        """Blocks of an owner's table that a token in block number `end` sees, up to that one."""
        first, start = self.first_seen(end), self._held[owner].first
        return list(self.pool.table(owner)[first - start : end - start])

    def extend(self, owner: int, end: int) -> list[tuple[int, int]]:
        """Lengthen a table to block number `end`; gives index and id of each new block.

        The caller has seen that as many are available.
        """
        return [(index, self.pool.append(owner)) for index in range(self.end(owner), end)]

    def trim(self, owner: int, block: int) -> None:
        """Give back what a token in block number `block`, and all after it, cannot see."""
        held, first = self._held[owner], self.first_seen(block)
        if first > held.first:
            self.pool.drop_first(owner, min(first, self.end(owner)) - held.first)
            held.first = first
            held.stored = max(held.stored, first)

    def store(self, owner: int, keys: Sequence[bytes]) -> tuple[int, Sequence[bytes]]:
        """Make the blocks of a table findable whose keys are known; `keys` are of all blocks.

        Gives what was not stored before: number of the first such block, and their keys.
        """
        held, end = self._held[owner], min(len(keys), self.end(owner))
        first, new = held.stored, keys[held.stored : end]
        if new:
            self.pool.store(owner, first - held.first, new)
            held.stored = end
        return first, new

    def close(self, owner: int) -> None:
        """Take a table's blocks back."""
        self.pool.free(owner)
        del self._held[owner]

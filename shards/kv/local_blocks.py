"""Blocks of layers with chunked or windowed attention: only the blocks that a token still sees.

A token sees the keys of its chunk, or of its window and the sinks. Blocks that no later token sees
are freed. A prefix hit needs only the blocks that the next token sees: a hit that ends on a chunk's
boundary needs none.

Knows blocks and their visibility; knows nothing of sequences, of the other pool, or of precedence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from arriero.shards.kv.blocks import BlockManager, CacheListener
from arriero.shards.kv.paging import SeenBlocks


@dataclass(slots=True)
class _Window:
    """Range of a sequence's blocks in an owner's table.

    Attributes:
        leading: number of the sequence's first blocks at the head of the table, as sinks.
        first: number of the first block after the sinks.
        stored: blocks before this number were offered to the prefix cache.
    """

    leading: int
    first: int
    stored: int

    def at(self, number: int) -> int:
        """Index in the table of a block number."""
        return number if number < self.leading else number - self.first + self.leading


class LocalBlocks:
    """Tables of the pool of layers with chunked or windowed attention.

    Args:
        num_blocks: blocks of the pool.
        seen: blocks that a token sees; bounded.
        on_event: callback for every key stored and evicted, if set.

    Attributes:
        pool: the blocks.
        seen: blocks that a token sees.
    """

    def __init__(
        self, num_blocks: int, seen: SeenBlocks, on_event: CacheListener | None = None
    ) -> None:
        assert seen.span, "with full attention no block is ever freed"
        assert seen.visible.chunk_size % seen.block_size == 0, "a block must lie in one chunk"
        self.pool = BlockManager(num_blocks, seen.block_size, on_event=on_event)
        self.seen = seen
        self._windows: dict[int, _Window] = {}

    @property
    def most(self) -> int:
        """Blocks that let a sequence continue forever, a block of tokens at a time."""
        return self.seen.sinks + self.seen.span

    def boundary(self, block: int) -> int:
        """End of the block numbers that a sequence in block `block` may have at the same time."""
        return self.seen.first(block) + self.seen.span

    def end(self, owner: int) -> int:
        """End of the block numbers in an owner's table."""
        window = self._windows[owner]
        return window.first + len(self.pool.table(owner)) - window.leading

    def longest(self, keys: Sequence[bytes], is_available: Callable[[bytes], bool]) -> int:
        """Longest prefix of `keys` whose next token sees available blocks only."""
        sinks = range(min(self.seen.sinks, len(keys)))
        # a token past a missing sink sees the sink, or has the sink in its window
        end = start = next((i for i in sinks if not is_available(keys[i])), len(keys))
        while start > self.seen.first(end):
            start -= 1
            if not is_available(keys[start]):
                end = start
        return end

    def match(self, keys: Sequence[bytes]) -> tuple[int, list[int]]:
        """Longest cached prefix of `keys`, and the blocks that its next token sees.

        Returns the length in blocks, and block ids in the order of `SeenBlocks.numbers`.
        """
        end = self.longest(keys, self.pool.holds)
        return end, self.pool.match(keys[number] for number in self.seen.numbers(end))

    def open(self, owner: int, end: int, shared: Sequence[int]) -> None:
        """Open a table for a prefix of `end` blocks; `shared` are those the next token sees."""
        self.pool.allocate(owner, len(shared), shared)
        first = self.seen.first(end)
        self._windows[owner] = _Window(min(self.seen.sinks, first), first, end)
        assert self.end(owner) == end, "`shared` must be the blocks that the next token sees"

    def seen_of(self, owner: int, end: int) -> list[int]:
        """Blocks of an owner's table, before number `end`, that a token in block `end` sees."""
        window, table = self._windows[owner], self.pool.table(owner)
        return [table[window.at(number)] for number in self.seen.numbers(end)]

    def extend(self, owner: int, end: int) -> list[tuple[int, int]]:
        """Lengthen a table to block number `end`; returns index and id of each new block.

        The caller must ensure that enough blocks are available.
        """
        return [(index, self.pool.append(owner)) for index in range(self.end(owner), end)]

    def trim(self, owner: int, block: int) -> None:
        """Free the blocks that no token from block number `block` on sees."""
        window, first = self._windows[owner], self.seen.first(block)
        if first > window.first:
            leading = min(self.seen.sinks, first)
            end = window.at(min(first, self.end(owner)))
            self.pool.drop(owner, leading, end)
            window.leading, window.first = leading, first
            window.stored = max(window.stored, first)

    def store(self, owner: int, keys: Sequence[bytes]) -> tuple[int, Sequence[bytes]]:
        """Put blocks of a table into the prefix cache; `keys` are the keys of all its blocks.

        Returns the number of the first newly stored block, and the new keys.
        """
        window, end = self._windows[owner], min(len(keys), self.end(owner))
        first, new = window.stored, keys[window.stored : end]
        if new:
            self.pool.store(owner, window.at(first), new)
            window.stored = end
        return first, new

    def close(self, owner: int) -> None:
        """Close a table and free its blocks."""
        self.pool.free(owner)
        del self._windows[owner]

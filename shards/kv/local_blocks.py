"""Blocks of layers that see part of what came before: of each sequence, those seen and no more.

A token sees the keys of its chunk, or of its window and the sinks. Blocks that no later token can
see go back to their pool. A prefix hit needs the blocks that its next token sees, and no others: a
hit that ends on a chunk's boundary needs none at all.

Knows blocks and which are seen; knows nothing of sequences, of the other pool, or of who goes
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from arriero.shards.kv.blocks import BlockManager, CacheListener
from arriero.shards.kv.paging import SeenBlocks


@dataclass(slots=True)
class _Held:
    """What an owner's table holds, in blocks of its sequence.

    Attributes:
        leading: so many of the sequence's first blocks stand first in the table, as sinks.
        first: number of the block after those.
        stored: blocks before this number have been offered to the cache.
    """

    leading: int
    first: int
    stored: int

    def at(self, number: int) -> int:
        """Where in the table a block stands."""
        return number if number < self.leading else number - self.first + self.leading


class LocalBlocks:
    """The pool of such layers.

    Args:
        num_blocks: of the pool.
        seen: which blocks a token sees; bounded.
        on_event: told of every key stored and evicted, when set.

    Attributes:
        pool: the blocks themselves.
        seen: as given.
    """

    def __init__(
        self, num_blocks: int, seen: SeenBlocks, on_event: CacheListener | None = None
    ) -> None:
        assert seen.span, "layers that see everything give nothing back"
        assert seen.visible.chunk_size % seen.block_size == 0, "a block lies in one chunk"
        self.pool = BlockManager(num_blocks, seen.block_size, on_event=on_event)
        self.seen = seen
        self._held: dict[int, _Held] = {}

    @property
    def most(self) -> int:
        """Blocks with which a sequence can go on for ever, a block of tokens at a time."""
        return self.seen.sinks + self.seen.span

    def due(self, block: int) -> int:
        """The number of the block up to which a sequence in block `block` may have its own."""
        return self.seen.first(block) + self.seen.span

    def end(self, owner: int) -> int:
        """Blocks of the sequence up to the end of an owner's table."""
        held = self._held[owner]
        return held.first + len(self.pool.table(owner)) - held.leading

    def longest(self, keys: Sequence[bytes], found: Callable[[bytes], bool]) -> int:
        """The longest prefix of `keys` of which all that its next token sees is `found`."""
        sinks = range(min(self.seen.sinks, len(keys)))
        # what lies past a sink that is missing sees it, or has it in its window
        end = start = next((i for i in sinks if not found(keys[i])), len(keys))
        while start > self.seen.first(end):
            start -= 1
            if not found(keys[start]):
                end = start
        return end

    def match(self, keys: Sequence[bytes]) -> tuple[int, list[int]]:
        """The longest prefix of `keys` that can be found, and the blocks that its next token sees.

        Gives its length in blocks, and block ids by `SeenBlocks.numbers` of it.
        """
        end = self.longest(keys, self.pool.holds)
        return end, self.pool.match(keys[number] for number in self.seen.numbers(end))

    def open(self, owner: int, end: int, shared: Sequence[int]) -> None:
        """Open a table of a prefix of `end` blocks on those that its next token sees."""
        self.pool.allocate(owner, len(shared), shared)
        first = self.seen.first(end)
        self._held[owner] = _Held(min(self.seen.sinks, first), first, end)
        assert self.end(owner) == end, "just the blocks that are seen"

    def seen_of(self, owner: int, end: int) -> list[int]:
        """Blocks of an owner's table that a token in block number `end` sees, up to that one."""
        held, table = self._held[owner], self.pool.table(owner)
        return [table[held.at(number)] for number in self.seen.numbers(end)]

    def extend(self, owner: int, end: int) -> list[tuple[int, int]]:
        """Lengthen a table to block number `end`; gives index and id of each new block.

        The caller has seen that as many are available.
        """
        return [(index, self.pool.append(owner)) for index in range(self.end(owner), end)]

    def trim(self, owner: int, block: int) -> None:
        """Give back what a token in block number `block`, and all after it, cannot see."""
        held, first = self._held[owner], self.seen.first(block)
        if first > held.first:
            leading = min(self.seen.sinks, first)
            gone = held.at(min(first, self.end(owner)))
            self.pool.drop(owner, leading, gone)
            held.leading, held.first = leading, first
            held.stored = max(held.stored, first)

    def store(self, owner: int, keys: Sequence[bytes]) -> tuple[int, Sequence[bytes]]:
        """Make the blocks of a table findable whose keys are known; `keys` are of all blocks.

        Gives what was not stored before: number of the first such block, and their keys.
        """
        held, end = self._held[owner], min(len(keys), self.end(owner))
        first, new = held.stored, keys[held.stored : end]
        if new:
            self.pool.store(owner, held.at(first), new)
            held.stored = end
        return first, new

    def close(self, owner: int) -> None:
        """Take a table's blocks back."""
        self.pool.free(owner)
        del self._held[owner]

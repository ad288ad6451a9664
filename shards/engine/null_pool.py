"""The pool of layers that see everything, where no layer does: tables without blocks.

It has room for every sequence and finds every prefix, so that the pool of the other layers alone
decides. Knows how long its tables are, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arriero.shards.kv.blocks import BlockManager

_PLENTY = 2**31 - 1


class NullBlockPool(BlockManager):
    """A `BlockManager` of no blocks, whose tables are as long as they are asked to be."""

    def __init__(self, block_size: int) -> None:
        super().__init__(0, block_size)
        self._lengths: dict[int, int] = {}

    @property
    def num_available(self) -> int:
        """As many as anyone may ask for."""
        return _PLENTY

    @property
    def num_used(self) -> int:
        """None: nothing is held."""
        return 0

    def table(self, owner: int) -> Sequence[int]:
        """Numbers of an owner's blocks, in order; no ids, since there are no blocks."""
        return range(self._lengths[owner])

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Every prefix is found."""
        return [index for index, _ in enumerate(keys)]

    def cost(self, num_blocks: int, shared: Sequence[int] = ()) -> int:
        """Nothing."""
        return 0

    def allocate(self, owner: int, num_blocks: int, shared: Sequence[int] = ()) -> None:
        """Open a table."""
        assert owner not in self._lengths, f"owner {owner} has a table already"
        self._lengths[owner] = num_blocks

    def append(self, owner: int) -> int:
        """Lengthen a table by one."""
        self._lengths[owner] += 1
        return self._lengths[owner] - 1

    def free(self, owner: int) -> None:
        """Close a table."""
        del self._lengths[owner]

    def store(self, owner: int, first: int, keys: Iterable[bytes]) -> None:
        """Nothing is kept."""

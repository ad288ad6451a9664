"""The pool of full-attention layers in a model without such layers: tables without blocks.

The pool has room for every sequence and matches every prefix, so the pool of the other layers
decides alone. Knows the lengths of tables and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arriero.shards.kv.blocks import BlockManager

_PLENTY = 2**31 - 1


class NullBlockPool(BlockManager):
    """A `BlockManager` without blocks, whose tables have any requested length."""

    def __init__(self, block_size: int) -> None:
        super().__init__(0, block_size)
        self._lengths: dict[int, int] = {}

    @property
    def num_available(self) -> int:
        """A number of blocks above every request."""
        return _PLENTY

    @property
    def num_used(self) -> int:
        """Always 0."""
        return 0

    def table(self, owner: int) -> Sequence[int]:
        """Indices of an owner's blocks, in order; no ids, since there are no blocks."""
        return range(self._lengths[owner])

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """All of the prefix matches."""
        return [index for index, _ in enumerate(keys)]

    def cost(self, num_blocks: int, shared: Sequence[int] = ()) -> int:
        """Always 0."""
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
        """Do nothing."""

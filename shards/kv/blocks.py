"""KV blocks of one pool: the users of each block, and the prefix cache of full blocks by key.

Knows block ids, reference counts and keys; knows nothing of the content of a block (known to the
slices), of requests or of time. A freed block may be allocated again at once, because the slices
run plans in the order of the allocations.

A full block's key is a hash of its parent's key and its tokens, so equal keys mean equal prefixes,
in every process and every run. Freed blocks with a key stay in the prefix cache until their room is
needed; the least recently used goes first. Blocks whose keys are retained go after all others.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16

CacheEvent = Literal["stored", "evicted", "kept", "dropped"]
CacheListener = Callable[[CacheEvent, bytes], None]
"""Callback for each key stored in the prefix cache on the device ("stored") or evicted ("evicted"),
and for each key that host memory or disk has now ("kept") or no more ("dropped")."""


def root_key(model_salt: bytes, request_salt: bytes = b"") -> bytes:
    """Parent key of first blocks; each salt is hashed alone, so no salt can imitate another."""
    return salted_root(model_root(model_salt), request_salt)


def model_root(model_salt: bytes) -> bytes:
    """The model's part of the parent key of first blocks."""
    return _digest(model_salt)


def salted_root(root: bytes, request_salt: bytes) -> bytes:
    """Parent key of first blocks, from the model's part and a request's salt."""
    return _digest(root + _digest(request_salt))


def chain_keys(parent: bytes, tokens: npt.NDArray[np.int32], block_size: int) -> Iterator[bytes]:
    """Keys of the full blocks that follow `parent`: blake2b-128 of (parent, tokens as <i4).

    Args:
        parent: key of the last block before, or `root_key`.
        tokens: int32 [N]; a last block that is not full has no key.
        block_size: tokens in a block.
    """
    data = np.ascontiguousarray(tokens, dtype="<i4").tobytes()
    width = 4 * block_size
    for start in range(0, len(data) - width + 1, width):
        parent = _digest(parent + data[start : start + width])
        yield parent


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


class BlockManager:
    """Allocates the blocks 0 .. num_blocks - 1 to tables, one table for each owner.

    An owner is any integer that the caller chooses. Blocks are shared by reference count; only full
    blocks are shared, so no sequence writes into a block that another reads.

    Attributes:
        num_blocks: blocks of the pool.
        block_size: tokens in a block.
        on_event: callback for every key stored and evicted, if set.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, on_event: CacheListener | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_event = on_event
        self._tables: dict[int, list[int]] = {}
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, without a key; low ids first
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with a key; oldest first
        self._retained: set[bytes] = set()
        # free, with a retained key; oldest first
        self._cached_retained: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now, cached and retained blocks included."""
        return len(self._blank) + self.num_cached

    @property
    def num_cached(self) -> int:
        """Unused blocks in the prefix cache."""
        return len(self._cached) + len(self._cached_retained)

    @property
    def num_used(self) -> int:
        """Blocks in some table."""
        return self.num_blocks - self.num_available

    def table(self, owner: int) -> Sequence[int]:
        """Block ids of an owner, in order; read-only, and valid only until the next call."""
        return self._tables[owner]

    def holds(self, key: bytes) -> bool:
        """Whether a block of this key is in the prefix cache."""
        return key in self._by_key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`, without a reference."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def cost(self, num_blocks: int, shared: Sequence[int] = ()) -> int:
        """Decrease of `num_available` by `allocate` with the same arguments."""
        references = self._references
        return num_blocks - len(shared) + sum(not references[block] for block in shared)

    def allocate(self, owner: int, num_blocks: int, shared: Sequence[int] = ()) -> None:
        """Open a table of `num_blocks`, the first of them `shared` with others or the cache.

        The caller must ensure that `cost` is at most `num_available`.
        """
        assert owner not in self._tables, f"owner {owner} has a table already"
        assert self.cost(num_blocks, shared) <= self.num_available, "allocation past the pool"
        for block in shared:
            if not self._references[block]:
                del self._queue(block)[block]
            self._references[block] += 1
        fresh = (self._take() for _ in range(num_blocks - len(shared)))
        self._tables[owner] = [*shared, *fresh]

    def append(self, owner: int) -> int:
        """Add one block to a table; the caller must ensure that a block is available."""
        block = self._take()
        self._tables[owner].append(block)
        return block

    def free(self, owner: int) -> None:
        """Close a table; its last block is the first to be evicted."""
        self._release(self._tables.pop(owner))

    def drop(self, owner: int, start: int, stop: int) -> None:
        """Free blocks start .. stop - 1 of a table."""
        table = self._tables[owner]
        self._release(table[start:stop])
        del table[start:stop]

    def store(self, owner: int, first: int, keys: Iterable[bytes]) -> None:
        """Put full blocks of a table into the prefix cache, from its block `first` on.

        A key stays with the first block that has the key. Call only once every token of the block
        is in a plan that goes before any plan that could match the key.
        """
        table = self._tables[owner]
        for index, key in enumerate(keys, first):
            block = table[index]
            if self._keys[block] is None and key not in self._by_key:
                self._keys[block] = key
                self._by_key[key] = block
                if self.on_event is not None:
                    self.on_event("stored", key)

    def retain(self, keys: Iterable[bytes]) -> None:
        """Evict blocks of these keys after all others, present blocks and later ones."""
        for key in keys:
            self._retained.add(key)
            block = self._by_key.get(key)
            if block is not None and block in self._cached:
                del self._cached[block]
                self._cached_retained[block] = None

    def unretain(self, keys: Iterable[bytes]) -> None:
        """Undo `retain`; unused blocks of these keys are the next to be evicted, the last first."""
        for key in keys:
            self._retained.discard(key)
            block = self._by_key.get(key)
            if block is not None and block in self._cached_retained:
                del self._cached_retained[block]
                self._cached[block] = None
                self._cached.move_to_end(block, last=False)

    def flush(self) -> int:
        """Remove unused blocks from the prefix cache; returns the number of blocks."""
        blocks = [*self._cached, *self._cached_retained]
        self._blank += blocks
        for block in blocks:
            self._forget(block)
        self._cached.clear()
        self._cached_retained.clear()
        return len(blocks)

    def _queue(self, block: int) -> OrderedDict[int, None]:
        """Where a free block with a key waits for its eviction."""
        return self._cached_retained if self._keys[block] in self._retained else self._cached

    def _forget(self, block: int) -> None:
        """Remove a block from the prefix cache."""
        key = self._keys[block]
        assert key is not None, f"block {block} is cached without a key"
        self._keys[block] = None
        del self._by_key[key]
        if self.on_event is not None:
            self.on_event("evicted", key)

    def _release(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._blank.append(block)
            else:
                self._queue(block)[block] = None

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = (self._cached or self._cached_retained).popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

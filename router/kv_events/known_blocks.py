"""Blocks whose tokens a gateway knows, and events when groups gain or lose them. Sans-I/O.

Groups report keys alone; the tokens of a block are known to the gateway that passed a request with
these tokens. So a gateway tells routers outside of arriero about the blocks of its own requests,
and a router that listens to all gateways learns of all blocks. A block counts as held while any
group holds the block, because the gateway sends a request to the group that has its prefix.

Knows keys, tokens and names of groups; knows nothing of sockets or of messages.

Shape legend: N blocks of a chain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.directory.table import Keys, Mask, fingerprints
from arriero.shards.kv.blocks import chain_keys

MAX_BLOCKS = 500_000
"""Most blocks whose tokens are kept; about 300 bytes each."""
MAX_EVENT_BLOCKS = 1024
"""Most blocks of an event."""

Medium = Literal["device", "below"]
"""On the device, or in host memory or on disk."""
MEDIA: tuple[Medium, Medium] = ("device", "below")
Holders = Callable[[Keys], Mapping[str, tuple[Mask, Mask]]]
"""By group: which of N keys are on its device, and which are in its host memory or on disk."""


@dataclass(slots=True)
class Stored:
    """Blocks of a chain that a group holds now, in order of the chain.

    Attributes:
        medium: where the blocks are.
        parent: key of the block before the first of these blocks; None at the start of a prompt.
        block_size: tokens in a block.
        keys: first 8 bytes of each block's key.
        tokens: token ids of the blocks, one after another.
    """

    medium: Medium
    parent: int | None
    block_size: int
    keys: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Removed:
    """Blocks that no group holds any more on `medium`."""

    medium: Medium
    keys: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Cleared:
    """No group holds any block."""


Event = Stored | Removed | Cleared


@dataclass(slots=True)
class _Block:
    """A block with known tokens; the bits of `device` and `below` stand for groups."""

    parent: int | None
    tokens: tuple[int, ...]
    device: int = 0
    below: int = 0


@dataclass(frozen=True, slots=True)
class ChainPoint:
    """A block of a chain, from which `KnownBlocks.learn` goes on.

    Attributes:
        num_blocks: blocks up to this block, itself included.
        key: its key; the root's at the start.
        print: first 8 bytes of the key; None at the start.
    """

    num_blocks: int
    key: bytes
    print: int | None


class KnownBlocks:
    """The known blocks of a gateway; methods note events, which `take` hands over.

    Args:
        capacity: most blocks; the least recently used chains lose their last blocks first.
    """

    def __init__(self, capacity: int = MAX_BLOCKS) -> None:
        self._capacity = capacity
        # least recently used first; a block always stands before its parent
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._bits: dict[str, int] = {}  # by group
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def learn(
        self,
        root: CacheRoot,
        tokens: Sequence[int],
        holders: Holders,
        after: ChainPoint | None = None,
    ) -> ChainPoint:
        """Note the tokens of a chain; events follow for the blocks that groups hold already.

        Args:
            root: start of the chain.
            tokens: token ids of prompt and output.
            holders: looks up which groups hold which keys.
            after: block up to which the chain was noted before; None for a new chain.

        Returns:
            The last full block.
        """
        point = ChainPoint(0, root.key, None) if after is None else after
        size, first = root.block_size, point.num_blocks
        data = np.asarray(tokens[first * size :], dtype=np.int32)
        keys = list(chain_keys(point.key, data, size))
        if not keys:
            return point
        prints = fingerprints(b"".join(keys))
        parent = point.print
        new: list[int] = []
        for number, key in enumerate(prints.tolist(), first):
            if key not in self._blocks:
                block = tuple(tokens[number * size : (number + 1) * size])
                self._blocks[key] = _Block(parent, block)
                new.append(number - first)
            parent = key
        self._touch(parent)
        if new:
            self._look_up(prints[new], holders)
        self._evict()
        return ChainPoint(first + len(keys), keys[-1], parent)

    def _touch(self, key: int | None) -> None:
        """Make a block and its parents the most recently used."""
        while key is not None and (block := self._blocks.get(key)) is not None:
            self._blocks.move_to_end(key)
            key = block.parent

    def _look_up(self, keys: Keys, holders: Holders) -> None:
        """Note who holds new blocks; changes of known blocks come as batches."""
        chain = keys.tolist()
        for group, (device, below) in holders(keys).items():
            bit = self._bit(group)
            for number in np.flatnonzero(device).tolist():
                self._set(chain[number], "device", bit, present=True)
            for number in np.flatnonzero(below).tolist():
                self._set(chain[number], "below", bit, present=True)

    def _evict(self) -> None:
        while len(self._blocks) > self._capacity:
            key = next(iter(self._blocks))
            for medium in MEDIA:
                if getattr(self._blocks[key], medium):
                    self._note_removed(key, medium)
            del self._blocks[key]

    def apply(self, group: str, batch: Batch) -> None:
        """Note the changes of a group."""
        bit = self._bit(group)
        for kind, key in zip(batch.kinds.tolist(), batch.keys.tolist(), strict=True):
            if key in self._blocks:
                near = kind in (CacheChange.ON_DEVICE, CacheChange.OFF_DEVICE)
                present = kind in (CacheChange.ON_DEVICE, CacheChange.OFFLOADED)
                self._set(key, "device" if near else "below", bit, present=present)

    def replace(self, group: str, snapshot: Snapshot) -> None:
        """Note all blocks of a group anew."""
        bit = self._bit(group)
        chain = list(reversed(self._blocks))  # parents first
        known = np.asarray(chain, dtype=np.uint64)
        for medium, keys in zip(MEDIA, (snapshot.near, snapshot.far), strict=True):
            for key, present in zip(chain, np.isin(known, keys).tolist(), strict=True):
                self._set(key, medium, bit, present=present)

    def drop(self, group: str) -> None:
        """Note the loss of a group."""
        bit = self._bits.pop(group, None)
        if bit is None:
            return
        any_left = any(block.device or block.below for block in self._blocks.values())
        if not self._bits:
            for block in self._blocks.values():
                block.device = block.below = 0
            if any_left:
                self._events.append(Cleared())
            return
        for key in self._blocks:
            for medium in MEDIA:
                self._set(key, medium, bit, present=False)

    def snapshot(self) -> Iterator[Stored]:
        """All held blocks, parents before children."""
        for medium in MEDIA:
            event: Stored | None = None
            for key in reversed(self._blocks):
                block = self._blocks[key]
                if not getattr(block, medium):
                    continue
                if event is None or not _extends(event, medium, block):
                    if event is not None:
                        yield event
                    event = Stored(medium, block.parent, len(block.tokens))
                event.keys.append(key)
                event.tokens += block.tokens
            if event is not None:
                yield event

    def _bit(self, group: str) -> int:
        bit = self._bits.get(group)
        if bit is None:
            used = sum(self._bits.values())
            bit = self._bits[group] = ~used & (used + 1)  # the lowest free bit
        return bit

    def _set(self, key: int, medium: Medium, bit: int, *, present: bool) -> None:
        block = self._blocks[key]
        before = getattr(block, medium)
        after = before | bit if present else before & ~bit
        if after == before:
            return
        setattr(block, medium, after)
        if not before:
            self._note_stored(key, medium, block)
        elif not after:
            self._note_removed(key, medium)

    def _note_stored(self, key: int, medium: Medium, block: _Block) -> None:
        last = self._events[-1] if self._events else None
        if not (isinstance(last, Stored) and _extends(last, medium, block)):
            last = Stored(medium, block.parent, len(block.tokens))
            self._events.append(last)
        last.keys.append(key)
        last.tokens += block.tokens

    def _note_removed(self, key: int, medium: Medium) -> None:
        last = self._events[-1] if self._events else None
        full = isinstance(last, Removed) and len(last.keys) >= MAX_EVENT_BLOCKS
        if not isinstance(last, Removed) or last.medium != medium or full:
            last = Removed(medium)
            self._events.append(last)
        last.keys.append(key)


def _extends(event: Stored, medium: Medium, block: _Block) -> bool:
    """Whether a block follows the last block of an event."""
    return (
        event.medium == medium
        and event.keys[-1] == block.parent
        and event.block_size == len(block.tokens)
        and len(event.keys) < MAX_EVENT_BLOCKS
    )

"""The journal of a group: all blocks of its cache, and the changes not yet sent to gateways.

The engine's thread adds changes; the link's thread takes them in batches and applies each batch to
a table of its own, so that a new gateway gets a snapshot without a call to the engine. Knows keys;
knows nothing of links.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.table import KeyTable, fingerprints
from arriero.shards.kv.blocks import CacheEvent

MOST_CHANGES = 20_000
"""Largest number of changes in a batch; limits the time that a batch blocks the link's loop."""
_CHANGES: dict[CacheEvent, CacheChange] = {
    "stored": CacheChange.ON_DEVICE,
    "evicted": CacheChange.OFF_DEVICE,
    "kept": CacheChange.OFFLOADED,
    "dropped": CacheChange.DROPPED,
}


class Journal:
    """The changes of a group; `note` is the engine's `on_event`.

    Args:
        capacity: largest possible number of blocks of the group.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changes: deque[tuple[CacheChange, bytes]] = deque()
        self._blocks = KeyTable()
        self._number = 0

    def note(self, event: CacheEvent, key: bytes) -> None:
        """Add a change; called from the engine's thread."""
        self._changes.append((_CHANGES[event], key))

    def next_batch(self) -> Batch | None:
        """The next changes for all gateways that have a snapshot; None without changes."""
        count = min(len(self._changes), MOST_CHANGES)
        if not count:
            return None
        changes = [self._changes.popleft() for _ in range(count)]
        kinds = np.asarray([change for change, _ in changes], dtype=np.uint8)
        keys = fingerprints(b"".join(key for _, key in changes))
        self._number += 1
        batch = Batch(self._number, kinds, keys)
        self._blocks.change(keys, 0, near=batch.near, present=batch.present)
        return batch

    def snapshot(self) -> Snapshot:
        """All blocks of the group after the last batch."""
        return Snapshot(self._number, *self._blocks.keys_of(0), self._capacity)

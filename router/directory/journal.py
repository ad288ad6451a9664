"""A group's end of the directory: what it holds, and what of it changed since gateways were told.

Changes come from the engine's thread, and are taken in pieces from the link's, which has a picture
of its own; so a gateway that comes is given a snapshot without a word to the engine. Knows keys;
knows nothing of links.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from arriero.router.directory.events import Batch, CacheChange, Snapshot
from arriero.router.directory.table import KeyTable, fingerprints
from arriero.shards.kv.blocks import CacheEvent

MOST_CHANGES = 20_000
"""Of a batch: few enough that the link's loop is not held up."""
_CHANGES: dict[CacheEvent, CacheChange] = {
    "stored": CacheChange.ON_DEVICE,
    "evicted": CacheChange.OFF_DEVICE,
    "kept": CacheChange.KEPT,
    "dropped": CacheChange.DROPPED,
}


class Journal:
    """The changes of one group; `note` is the engine's `on_event`.

    Args:
        capacity: most blocks that the group can hold.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._changes: deque[tuple[CacheChange, bytes]] = deque()
        self._held = KeyTable()
        self._number = 0

    def note(self, event: CacheEvent, key: bytes) -> None:
        """Take a change; from the engine's thread."""
        self._changes.append((_CHANGES[event], key))

    def take(self) -> Batch | None:
        """The next changes, for every gateway that has had a snapshot; None when there are none."""
        count = min(len(self._changes), MOST_CHANGES)
        if not count:
            return None
        taken = [self._changes.popleft() for _ in range(count)]
        kinds = np.asarray([change for change, _ in taken], dtype=np.uint8)
        keys = fingerprints(b"".join(key for _, key in taken))
        self._number += 1
        batch = Batch(self._number, kinds, keys)
        self._held.change(keys, 0, near=batch.near, present=batch.present)
        return batch

    def snapshot(self) -> Snapshot:
        """All that the group holds as of the last batch."""
        return Snapshot(self._number, *self._held.held(0), self._capacity)

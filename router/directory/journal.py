"""A group's end of the directory: changes of its blocks, gathered for each gateway that listens.

Changes come from the engine's thread and are taken from the link's; a gateway that lags behind is
given a snapshot instead of all that it missed. Knows keys and listeners; knows nothing of links.
"""

from __future__ import annotations

from asyncio import wrap_future
from collections import deque
from collections.abc import Sequence

import numpy as np

from arriero.router.directory.events import Batch, Change, Snapshot
from arriero.router.directory.table import Keys, fingerprints
from arriero.shards.engine.blocks import CacheEvent
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.lanes import Lanes

MAX_BEHIND = 200_000
"""Changes that may wait for a gateway; past it, it gets a snapshot."""
_CHANGES: dict[CacheEvent, Change] = {
    "stored": Change.ON_DEVICE,
    "evicted": Change.OFF_DEVICE,
    "kept": Change.KEPT,
    "dropped": Change.DROPPED,
}


class Journal:
    """The changes of one group; `note` is the engine's `on_event`."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def note(self, event: CacheEvent, key: bytes) -> None:
        """Take a change; from the engine's thread."""
        for listener in self._listeners:
            listener.add(_CHANGES[event], key)

    async def listen(self, engine: Engine) -> Listener:
        """A listener that has everything from a snapshot on, which is its first word.

        Raises:
            Unavailable: the engine has ended.
        """
        return await wrap_future(engine.ask(self._open))

    def _open(self, lanes: Lanes) -> Listener:
        """In the engine's thread: nothing changes between the snapshot and the first change."""
        near, far = lanes.held()
        made = Listener(self, Snapshot(0, _fingerprints(near), _fingerprints(far)))
        self._listeners = [*self._listeners, made]
        return made

    def leave(self, listener: Listener) -> None:
        """Gather no more for a listener."""
        self._listeners = [one for one in self._listeners if one is not listener]


class Listener:
    """What one gateway has yet to hear.

    Attributes:
        first: the snapshot.
        lost: it lagged too far behind; another must take its place.
    """

    def __init__(self, journal: Journal, first: Snapshot) -> None:
        self._journal = journal
        self.first = first
        self.lost = False
        self._number = first.number
        self._waiting: deque[tuple[Change, bytes]] = deque()

    def add(self, change: Change, key: bytes) -> None:
        """One more change."""
        if len(self._waiting) >= MAX_BEHIND:
            self.lost = True
        if not self.lost:
            self._waiting.append((change, key))

    def close(self) -> None:
        """Hear no more."""
        self._journal.leave(self)

    def take(self) -> Batch | None:
        """All that waits; None when nothing does."""
        count = len(self._waiting)
        if not count:
            return None
        taken = [self._waiting.popleft() for _ in range(count)]
        self._number += 1
        kinds = np.asarray([change for change, _ in taken], dtype=np.uint8)
        return Batch(self._number, kinds, _fingerprints([key for _, key in taken]))


def _fingerprints(keys: Sequence[bytes]) -> Keys:
    return fingerprints(b"".join(keys))

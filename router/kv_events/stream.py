"""The numbered batches of KV events of a gateway, with a bounded history for late readers.

Readers hold a number and ask for the batches after the number; a reader that the history no longer
reaches begins again with all held blocks. Knows events, numbers and times; knows nothing of
sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from arriero.router.directory.events import Batch, Snapshot
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.kv_events.known_blocks import (
    MAX_EVENT_BLOCKS,
    ChainPoint,
    Cleared,
    Event,
    Holders,
    KnownBlocks,
)

MAX_HISTORY = 10_000
"""Most batches of the history."""
MAX_HISTORY_BLOCKS = 200_000
"""Most blocks in the batches of the history."""


@dataclass(frozen=True, slots=True)
class KvBatch:
    """A numbered batch.

    Attributes:
        number: 1 for the first batch of a gateway, then 1 more each.
        time_s: seconds since 1970.
        events: events in order, of at most `MAX_EVENT_BLOCKS` blocks in all.
    """

    number: int
    time_s: float
    events: tuple[Event, ...]


class KvEventStream:
    """The events of a gateway; all methods are called on the event loop.

    Args:
        blocks: the known blocks.

    Attributes:
        number: number of the last batch; 0 before the first.
        closed: readers must end.
    """

    def __init__(self, blocks: KnownBlocks | None = None) -> None:
        self._blocks = KnownBlocks() if blocks is None else blocks
        self._history: deque[KvBatch] = deque()
        self._history_blocks = 0
        self._changed = asyncio.Event()
        self.number = 0
        self.closed = False

    def close(self) -> None:
        """Wake all readers, so that they end."""
        self.closed = True
        self._changed.set()

    def learn(
        self,
        root: CacheRoot,
        tokens: Sequence[int],
        holders: Holders,
        after: ChainPoint | None = None,
    ) -> ChainPoint:
        """As `KnownBlocks.learn`."""
        point = self._blocks.learn(root, tokens, holders, after)
        self._publish()
        return point

    def update(self, group: str, change: Batch | Snapshot) -> None:
        """Note the changes, or all blocks, of a group."""
        if isinstance(change, Snapshot):
            self._blocks.replace(group, change)
        else:
            self._blocks.apply(group, change)
        self._publish()

    def drop(self, group: str) -> None:
        """Note the loss of a group."""
        self._blocks.drop(group)
        self._publish()

    def since(self, number: int) -> list[KvBatch] | None:
        """The batches from `number` on; None when the history does not reach back so far."""
        first = self._history[0].number if self._history else self.number + 1
        if not first <= number <= self.number + 1:
            return None
        return [batch for batch in self._history if batch.number >= number]

    def history(self) -> list[KvBatch]:
        """All batches of the history."""
        return list(self._history)

    def snapshot(self) -> list[tuple[Event, ...]]:
        """All held blocks, in chunks of at most `MAX_EVENT_BLOCKS` blocks after a `Cleared`.

        Where there are more chunks than batches so far, empty batches are added: the chunks then
        take the numbers of the last batches.
        """
        chunks = list(_chunks([Cleared(), *self._blocks.snapshot()]))
        while self.number < len(chunks):
            self._add(())
        return chunks

    async def wait(self, number: int, timeout_s: float) -> None:
        """Wait until a batch of this number exists, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.number < number and not self.closed:
                    await self._changed.wait()

    def _publish(self) -> None:
        for events in _chunks(self._blocks.take()):
            self._add(events)

    def _add(self, events: tuple[Event, ...]) -> None:
        self.number += 1
        self._history.append(KvBatch(self.number, time.time(), events))
        self._history_blocks += _count(events)
        while len(self._history) > MAX_HISTORY or self._history_blocks > MAX_HISTORY_BLOCKS:
            self._history_blocks -= _count(self._history.popleft().events)
        self._changed.set()
        self._changed = asyncio.Event()


def _count(events: Sequence[Event]) -> int:
    return sum(0 if isinstance(event, Cleared) else len(event.keys) for event in events)


def _chunks(events: Sequence[Event]) -> Iterator[tuple[Event, ...]]:
    """Events in runs of at most `MAX_EVENT_BLOCKS` blocks."""
    run: list[Event] = []
    size = 0
    for event in events:
        count = _count((event,))
        if run and size + count > MAX_EVENT_BLOCKS:
            yield tuple(run)
            run, size = [], 0
        run.append(event)
        size += count
    if run:
        yield tuple(run)

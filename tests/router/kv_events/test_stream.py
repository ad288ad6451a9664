"""The numbered batches: history, late readers, all held blocks."""

from __future__ import annotations

import asyncio

import numpy as np

from arriero.router.directory.prefixes import CacheRoot
from arriero.router.directory.table import Keys, Mask
from arriero.router.kv_events import stream as stream_module
from arriero.router.kv_events.known_blocks import MAX_EVENT_BLOCKS, Cleared, Stored
from arriero.router.kv_events.stream import KvEventStream

ROOT = CacheRoot(b"r" * 16, 1)


def hold_all(keys: Keys) -> dict[str, tuple[Mask, Mask]]:
    return {"g0": (np.ones(len(keys), dtype=bool), np.zeros(len(keys), dtype=bool))}


async def test_batches_are_bounded_and_numbered() -> None:
    stream = KvEventStream()
    assert stream.since(1) == []
    stream.learn(ROOT, list(range(3 * MAX_EVENT_BLOCKS + 5)), hold_all)
    assert stream.number == 4
    batches = stream.since(1)
    assert batches is not None
    assert [batch.number for batch in batches] == [1, 2, 3, 4]
    assert all(
        sum(len(event.keys) for event in batch.events if isinstance(event, Stored))
        <= MAX_EVENT_BLOCKS
        for batch in batches
    )
    assert stream.since(6) is None, "a number of an earlier gateway"
    chunks = stream.snapshot()
    assert chunks[0][0] == Cleared()
    assert len(chunks) <= stream.number
    tokens = [
        t for run in chunks for event in run if isinstance(event, Stored) for t in event.tokens
    ]
    assert tokens == list(range(3 * MAX_EVENT_BLOCKS + 5)), "parents before children"


async def test_the_history_is_bounded(monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setattr(stream_module, "MAX_HISTORY_BLOCKS", 10)
    stream = KvEventStream()
    for length in range(1, 31):
        stream.learn(ROOT, list(range(length)), hold_all)
    assert stream.number == 30
    assert stream.since(20) is None
    batches = stream.since(21)
    assert batches is not None and [batch.number for batch in batches] == list(range(21, 31))
    assert stream.history() == batches


async def test_readers_wait_for_the_next_batch() -> None:
    stream = KvEventStream()
    waiting = asyncio.create_task(stream.wait(1, 30))
    await asyncio.sleep(0)
    assert not waiting.done()
    stream.learn(ROOT, [1, 2], hold_all)
    await asyncio.wait_for(waiting, 5)
    await stream.wait(2, 0.01)
    assert stream.number == 1

"""KV events on ZeroMQ, read as vLLM's subscribers read: real sockets, msgpack arrays, replay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from arriero.router.directory.events import Snapshot
from arriero.router.directory.prefixes import CacheRoot
from arriero.router.directory.table import Keys, Mask, fingerprints
from arriero.router.kv_events.stream import KvEventStream
from arriero.router.kv_events.zmq_publisher import END, KvEventsConfig, ZmqPublisher
from arriero.shards.kv.blocks import chain_keys
from support.eventually import eventually_async

ROOT = CacheRoot(b"r" * 16, 4)


def keys_of(tokens: list[int]) -> Keys:
    return fingerprints(b"".join(chain_keys(ROOT.key, np.asarray(tokens, dtype=np.int32), 4)))


def hold_all(keys: Keys) -> dict[str, tuple[Mask, Mask]]:
    """A group that has every block on its device."""
    return {"g0": (np.ones(len(keys), dtype=bool), np.zeros(len(keys), dtype=bool))}


# The shapes of vLLM's own classes, as its subscribers decode them.
class Event(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(Event):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(Event):
    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(Event):
    pass


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


DECODER = msgspec.msgpack.Decoder(KVEventBatch)


@pytest.fixture
async def published() -> AsyncIterator[tuple[KvEventStream, ZmqPublisher, zmq.asyncio.Context]]:
    stream = KvEventStream()
    config = KvEventsConfig(
        publish="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0", topic="kv@here@tiny"
    )
    publisher = ZmqPublisher(config, stream)
    publisher.start()
    context = zmq.asyncio.Context()
    try:
        async with asyncio.timeout(30):
            yield stream, publisher, context
    finally:
        context.destroy(linger=0)
        await publisher.stop()


async def test_batches_arrive_in_vllms_shape(published) -> None:  # noqa: ANN001
    stream, publisher, context = published
    reader = context.socket(zmq.SUB)
    reader.subscribe("kv@")
    reader.connect(publisher.publish)
    tokens = list(range(8))
    keys = keys_of(tokens).tolist()
    received: list[list[bytes]] = []

    async def joined() -> bool:
        stream.learn(ROOT, [*range(100, 100 + 4 * (stream.number + 1))], hold_all)
        return bool(await reader.poll(20))

    while not await joined():
        pass
    while await reader.poll(100):
        received.append(await reader.recv_multipart())
    first = stream.number + 1
    stream.learn(ROOT, tokens, hold_all)
    topic, number, raw = await reader.recv_multipart()
    assert (topic, int.from_bytes(number, "big")) == (b"kv@here@tiny", first)
    batch = DECODER.decode(raw)
    stored = BlockStored(keys, None, tokens, 4, None, "GPU", None)
    assert (batch.events, batch.data_parallel_rank) == ([stored], 0)
    # the raw array, too: readers of other languages go by positions
    assert msgspec.msgpack.decode(raw)[1][0][0] == "BlockStored"
    stream.update("g1", Snapshot(0, np.asarray(keys[:1], dtype=np.uint64)))
    stream.drop("g0")
    raw = (await reader.recv_multipart())[2]
    (removed,) = DECODER.decode(raw).events
    assert isinstance(removed, BlockRemoved) and keys[1] in removed.block_hashes
    stream.drop("g1")
    raw = (await reader.recv_multipart())[2]
    assert DECODER.decode(raw).events == [AllBlocksCleared()]


async def test_missed_batches_are_replayed(published) -> None:  # noqa: ANN001
    stream, publisher, context = published
    for length in range(1, 6):
        stream.learn(ROOT, list(range(4 * length)), hold_all)
    await eventually_async(lambda: stream.number == 5)
    reader = context.socket(zmq.DEALER)
    reader.connect(publisher.replay)
    for start, expected in ((3, [3, 4, 5]), (1, [1, 2, 3, 4, 5]), (0, [1, 2, 3, 4, 5]), (9, [])):
        await reader.send_multipart([b"", start.to_bytes(8, "big")])
        numbers = []
        while True:
            empty, topic, number, raw = await reader.recv_multipart()
            assert empty == b""
            if number == END:
                assert (topic, raw) == (b"", b"")
                break
            assert topic == b"kv@here@tiny"
            numbers.append(int.from_bytes(number, "big"))
            (event,) = DECODER.decode(raw).events
            assert isinstance(event, BlockStored) and len(event.token_ids) == 4
        assert numbers == expected
    # what is no request is passed over, and the next request is answered
    await reader.send_multipart([b"", b"short"])
    await reader.send_multipart([b"", (5).to_bytes(8, "big")])
    assert int.from_bytes((await reader.recv_multipart())[2], "big") == 5


async def test_an_address_in_use_is_refused(published) -> None:  # noqa: ANN001
    stream, publisher, _ = published
    with pytest.raises(OSError, match="cannot listen on"):
        ZmqPublisher(KvEventsConfig(publish=publisher.publish), stream).start()
    other = ZmqPublisher(
        KvEventsConfig(publish="tcp://127.0.0.1:0", replay=publisher.replay), stream
    )
    with pytest.raises(OSError, match="cannot listen on"):
        other.start()
    await other.stop()

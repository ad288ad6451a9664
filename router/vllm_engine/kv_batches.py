"""KV events as messages of VllmEngine. Sans-I/O.

A subscriber without a number, or with a number that the history does not reach, gets all held
blocks first: chunks that take the numbers of the last batches. Knows events and messages; knows
nothing of connections.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from smg_grpc_proto.generated import common_pb2 as common

from arriero.router.kv_events.known_blocks import Event, Medium, Removed, Stored
from arriero.router.kv_events.stream import KvBatch, KvEventStream
from arriero.router.kv_events.vllm_messages import DP_RANK, MEDIUM

_TIERS: dict[Medium, int] = {
    "device": common.KV_CACHE_TIER_DEVICE,
    "below": common.KV_CACHE_TIER_HOST,
}
_LEVELS: dict[Medium, int] = {"device": 0, "below": 1}


def batch_message(batch: KvBatch) -> common.KvEventBatch:
    """The message of a batch."""
    return common.KvEventBatch(
        sequence_number=batch.number,
        timestamp=batch.time_s,
        events=_events(batch.number, batch.events),
        dp_rank=DP_RANK,
    )


def snapshot_messages(stream: KvEventStream) -> list[common.KvEventBatch]:
    """All held blocks, as chunks that end at the number of the last batch; none before it."""
    if not stream.number:
        return []
    chunks = stream.snapshot()
    count = len(chunks)
    blocks = sum(len(event.keys) for run in chunks for event in run if isinstance(event, Stored))
    first = stream.number - count + 1
    return [
        common.KvEventBatch(
            sequence_number=first + index,
            timestamp=time.time(),
            events=_events(0, run),
            dp_rank=DP_RANK,
            snapshot=common.KvSnapshotChunk(index=index, count=count, blocks=blocks),
        )
        for index, run in enumerate(chunks)
    ]


def load_message(number: int, load: common.EngineLoad) -> common.KvEventBatch:
    """A message without events, with the load alone."""
    return common.KvEventBatch(
        sequence_number=number, timestamp=time.time(), dp_rank=DP_RANK, load=load
    )


def _events(number: int, events: Sequence[Event]) -> list[common.KvCacheEvent]:
    """The events of a batch; their ids are the batch's number, and 0 in a snapshot."""
    return [_event(number, event) for event in events]


def _event(number: int, event: Event) -> common.KvCacheEvent:
    if isinstance(event, Stored):
        return common.KvCacheEvent(event_id=number, stored=_stored(event))
    if isinstance(event, Removed):
        removed = common.KvBlocksRemoved(
            block_hashes=[_signed(key) for key in event.keys],
            cache_level=_LEVELS[event.medium],
            tier=_TIERS[event.medium],
            medium=MEDIUM[event.medium],
        )
        return common.KvCacheEvent(event_id=number, removed=removed)
    return common.KvCacheEvent(event_id=number, cleared=common.KvCacheCleared())


def _stored(event: Stored) -> common.KvBlocksStored:
    size = event.block_size
    stored = common.KvBlocksStored(tier=_TIERS[event.medium], medium=MEDIUM[event.medium])
    for number, key in enumerate(event.keys):
        stored.blocks.add(
            block_hash=_signed(key),
            token_ids=event.tokens[number * size : (number + 1) * size],
            block_size=size,
            cache_level=_LEVELS[event.medium],
        )
    if event.parent is not None:
        stored.parent_block_hash = _signed(event.parent)
    return stored


def _signed(key: int) -> int:
    """The 64 bits of a key as a signed number."""
    return key - 2**64 if key >= 2**63 else key

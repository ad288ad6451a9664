"""KV events in the msgpack arrays of vLLM, for routers that read vLLM's events.

A payload is `[seconds since 1970, events, data parallel rank]`; an event is an array that begins
with its name: `["BlockStored", hashes, parent, tokens, block size, LoRA id, medium, LoRA name]`,
`["BlockRemoved", hashes, medium]`, `["AllBlocksCleared"]`. Knows the arrays; knows nothing of
sockets.
"""

from __future__ import annotations

import msgspec

from arriero.router.kv_events.known_blocks import Event, Medium, Removed, Stored
from arriero.router.kv_events.stream import KvBatch

MEDIUM: dict[Medium, str] = {"device": "GPU", "below": "CPU"}
"""vLLM's names of the media."""
DP_RANK = 0
"""A gateway counts as one engine with one rank."""


def payload(batch: KvBatch) -> bytes:
    """The bytes of a batch."""
    return msgspec.msgpack.encode([batch.time_s, [_event(e) for e in batch.events], DP_RANK])


def _event(event: Event) -> list[object]:
    if isinstance(event, Stored):
        medium = MEDIUM[event.medium]
        block = [event.keys, event.parent, event.tokens, event.block_size]
        return ["BlockStored", *block, None, medium, None]
    if isinstance(event, Removed):
        return ["BlockRemoved", event.keys, MEDIUM[event.medium]]
    return ["AllBlocksCleared"]

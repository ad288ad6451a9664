"""Responses that are kept for later requests: `previous_response_id`, GET, streams resumed.

Bounded by bytes, number and age; the oldest go first. Each tenant sees its own responses only. A
gateway keeps its responses in memory; an `Archive`, where there is one, keeps those that have ended
for all gateways. Knows JSON and events as bytes; knows nothing of calls.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from arriero.shards.errors import NotFound

Json = dict[str, Any]
Key = tuple[str, str]
"""Name of the tenant, and id of the response."""

MAX_BYTES = 256 * 1024 * 1024
MAX_RESPONSES = 10_000
MAX_AGE_S = 3600.0
ABANDONED_S = 30.0
"""Seconds without a reader after which a streamed response is cancelled; not in background."""


class Archive(Protocol):
    """Keeps ended responses for all gateways."""

    async def put(self, key: Key, value: bytes) -> None:
        """Keep a response."""

    async def get(self, key: Key) -> bytes | None:
        """A response; None when it is not kept."""

    async def delete(self, key: Key) -> None:
        """Forget a response; does nothing when it is not kept."""


@dataclass(eq=False)
class StoredResponse:
    """A response, running or ended.

    Attributes:
        tenant: name of the tenant.
        response: the response in the API's JSON; read-only once ended.
        earlier: items of the earlier responses, in order.
        items: items of the request's input.
        events: server-sent events so far, by sequence number; empty for a response without stream.
        task: runs the response; None once ended, or without stream.
        ended: whether the response has ended.
    """

    tenant: str
    response: Json
    earlier: list[Json]
    items: list[Json]
    events: list[bytes] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    ended: bool = False
    _size: int = 0
    _born_s: float = field(default_factory=time.monotonic)
    _num_readers: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _abandon: asyncio.TimerHandle | None = None

    @property
    def key(self) -> Key:
        """Key in the store."""
        return self.tenant, self.response["id"]

    @property
    def conversation(self) -> list[Json]:
        """All items up to and with the output."""
        return [*self.earlier, *self.items, *self.response["output"]]

    def add(self, events: bytes) -> None:
        """Append server-sent events."""
        self.events += [event + b"\n\n" for event in events.split(b"\n\n") if event]
        self._wake()

    def end(self) -> None:
        """Note the end of the response."""
        self.ended, self.task = True, None
        self._wake()

    async def follow(self, start: int) -> AsyncGenerator[bytes]:
        """The events from a sequence number on, as they come, to the end of the response."""
        self._num_readers += 1
        if self._abandon is not None:
            self._abandon.cancel()
        try:
            while True:
                changed = self._changed
                while start < len(self.events):
                    start += 1
                    yield self.events[start - 1]
                if self.ended:
                    return
                await changed.wait()
        finally:
            self._num_readers -= 1
            if not self._num_readers and self.task is not None and not self.response["background"]:
                loop = asyncio.get_running_loop()
                self._abandon = loop.call_later(ABANDONED_S, self.cancel)

    async def wait(self) -> None:
        """Wait for more events, or the end."""
        await self._changed.wait()

    def cancel(self) -> None:
        """Cancel the response if it runs."""
        if self.task is not None:
            self.task.cancel()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class ResponseStore:
    """The responses of a gateway.

    Args:
        archive: keeps ended responses for all gateways; None for memory alone.
        max_bytes, max_responses, max_age_s: limits of the memory.
    """

    def __init__(
        self,
        archive: Archive | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        max_responses: int = MAX_RESPONSES,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        self._archive = archive
        self._max_bytes, self._max_responses = max_bytes, max_responses
        self._max_age_s = max_age_s
        self._stored: OrderedDict[Key, StoredResponse] = OrderedDict()
        self._num_bytes = 0

    def begin(self, stored: StoredResponse) -> None:
        """Keep a response that runs."""
        self._stored[stored.key] = stored

    async def end(self, stored: StoredResponse) -> None:
        """Keep a response that has ended, here and in the archive."""
        stored.end()
        value = json.dumps(
            {"response": stored.response, "earlier": stored.earlier, "items": stored.items}
        ).encode()
        self._insert(stored, len(value) + sum(map(len, stored.events)))
        if self._archive is not None:
            await self._archive.put(stored.key, value)

    async def get(self, tenant: str, response_id: str) -> StoredResponse:
        """A response.

        Raises:
            NotFound: the tenant has no such response, or it is no longer kept.
        """
        key = (tenant, response_id)
        self._drop_old()
        stored = self._stored.get(key)
        if stored is None and self._archive is not None:
            value = await self._archive.get(key)
            if value is not None:
                stored = StoredResponse(tenant=tenant, **json.loads(value), ended=True)
                self._insert(stored, len(value))
        if stored is None:
            raise NotFound(
                f"response {response_id[:128]!r} is not stored; responses are kept for at most "
                f"{self._max_age_s:.0f} s; send the whole input",
                field="response_id",
                code="response_not_found",
            )
        return stored

    async def delete(self, stored: StoredResponse) -> None:
        """Forget a response; one that runs is cancelled."""
        stored.cancel()
        self._forget(stored.key)
        if self._archive is not None:
            await self._archive.delete(stored.key)

    async def close(self) -> None:
        """Cancel all responses that run."""
        tasks = [stored.task for stored in self._stored.values() if stored.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _insert(self, stored: StoredResponse, size: int) -> None:
        self._forget(stored.key)
        stored._size = size
        self._num_bytes += size
        self._stored[stored.key] = stored
        self._drop_old()
        while self._num_bytes > self._max_bytes or len(self._stored) > self._max_responses:
            oldest = next((key for key, kept in self._stored.items() if kept.ended), None)
            if oldest is None:
                return
            self._forget(oldest)

    def _drop_old(self) -> None:
        limit_s = time.monotonic() - self._max_age_s
        old = [key for key, kept in self._stored.items() if kept.ended and kept._born_s < limit_s]
        for key in old:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        stored = self._stored.pop(key, None)
        if stored is not None:
            self._num_bytes -= stored._size

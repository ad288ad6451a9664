"""Streams that outlive their connection: messages kept for a client that comes back.

A kept stream runs on in a task of its own; whoever reads it, reads from any message on. Without a
reader it is kept for the time it asked for, then it is cancelled (or, if it has ended, forgotten).
Knows messages and time; knows nothing of what is in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from arriero.router.response import Message
from arriero.shards.errors import InvalidRequest, NotFound, Overloaded, Unavailable

MAX_KEPT = 10_000
"""Most streams kept at once by one gateway."""

Stream = AsyncGenerator[Message]
Key = tuple[str, str]
"""Whose it is, and its request id: a tenant finds its own alone."""


class ResumableStreams:
    """The kept streams of one gateway, by tenant and request id."""

    def __init__(self) -> None:
        self._streams: dict[Key, _ResumableStream] = {}

    def keep(self, key: Key, stream: Stream, keep_s: float) -> Stream:
        """Run a stream on its own; gives its messages from the first on.

        Raises:
            InvalidRequest: one of that id is kept.
            Overloaded: as many are kept as may be.
        """
        if key in self._streams:
            raise InvalidRequest(
                "request_id", f"`request_id`={key[1]!r} is kept already; choose another"
            )
        if len(self._streams) >= MAX_KEPT:
            raise Overloaded(f"{MAX_KEPT} calls are kept already; leave `resumable_s` out", 1.0)
        kept = self._streams[key] = _ResumableStream(stream, keep_s)
        kept.task.add_done_callback(lambda task: self._schedule(key, kept))
        self._schedule(key, kept)  # until somebody reads it
        return self._read(key, kept, 0)

    def attach(self, key: Key, received: int) -> Stream:
        """The messages of a kept stream after the first `received`.

        Raises:
            NotFound: none of that id is kept.
            InvalidRequest: it has not had so many messages.
        """
        kept = self._streams.get(key)
        if kept is None:
            raise NotFound(f"no call {key[1]!r} is kept here; send it again with `resumed`")
        if received > len(kept.messages):
            raise InvalidRequest(
                "received", f"`received`={received} exceeds the {len(kept.messages)} messages sent"
            )
        return self._read(key, kept, received)

    async def close(self) -> None:
        """Cancel and forget all of them."""
        streams, self._streams = self._streams, {}
        for kept in streams.values():
            kept.cancel()
        await asyncio.gather(*(kept.task for kept in streams.values()), return_exceptions=True)

    async def _read(self, key: Key, kept: _ResumableStream, at: int) -> Stream:
        kept.readers += 1
        kept.unschedule()
        try:
            while True:
                while at < len(kept.messages):
                    at += 1
                    yield kept.messages[at - 1]
                if kept.task.cancelled():
                    raise Unavailable("the gateway is stopping; send it again with `resumed`")
                if kept.task.done():
                    kept.task.result()  # the error it ended in, if it did
                    return
                await kept.wait()
        finally:
            kept.readers -= 1
            self._schedule(key, kept)

    def _schedule(self, key: Key, kept: _ResumableStream) -> None:
        """Start to count its time once nobody reads it."""
        if self._streams.get(key) is kept and not kept.readers:
            kept.schedule(lambda: self._drop(key, kept))

    def _drop(self, key: Key, kept: _ResumableStream) -> None:
        if self._streams.get(key) is kept:
            del self._streams[key]
            kept.cancel()


class _ResumableStream:
    """One stream, its messages so far, and who waits for more."""

    def __init__(self, stream: Stream, keep_s: float) -> None:
        self.messages: list[Message] = []
        self.readers = 0
        self.keep_s = keep_s
        self.task = asyncio.create_task(self._run(stream))
        self.task.add_done_callback(self._ended)
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        """Until there is another message, or the end."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def schedule(self, drop: Callable[[], None]) -> None:
        """Call `drop` after the stream's time."""
        self.unschedule()
        self._timer = asyncio.get_running_loop().call_later(self.keep_s, drop)

    def unschedule(self) -> None:
        """Keep it for now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cancel(self) -> None:
        """End it."""
        self.unschedule()
        self.task.cancel()

    async def _run(self, stream: Stream) -> None:
        async with aclosing(stream):
            async for message in stream:
                self.messages.append(message)
                self._wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # readers see it; without any it is no news
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

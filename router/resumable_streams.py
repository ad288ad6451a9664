"""Resumable streams: the gateway stores items for a client that loses its connection.

A resumable stream runs in a task of its own; a reader starts at any message. A stream without a
reader stays for the time of the request's option, then the gateway cancels and drops the stream.
gRPC stores messages, HTTP the messages of all calls of an answer. Knows items and time; knows
nothing of the contents of items.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

from arriero.shards.errors import InvalidRequest, NotFound, Overloaded, Unavailable

MAX_STREAMS = 10_000
"""Most streams stored at once by a gateway."""

T = TypeVar("T")
Key = tuple[str, str]
"""Tenant and request id; a tenant finds only its own streams."""


class ResumableStreams(Generic[T]):
    """The resumable streams of a gateway, by tenant and request id."""

    def __init__(self) -> None:
        self._streams: dict[Key, _ResumableStream[T]] = {}

    def keep(self, key: Key, stream: AsyncGenerator[T], keep_s: float) -> AsyncGenerator[T]:
        """Run a stream in a task of its own; returns its messages from the first on.

        Raises:
            InvalidRequest: a stream of this id is stored.
            Overloaded: the limit of stored streams is reached.
        """
        if key in self._streams:
            raise InvalidRequest(
                "request_id",
                f"`request_id`={key[1]!r} is in use by a resumable call; choose another id",
            )
        if len(self._streams) >= MAX_STREAMS:
            raise Overloaded(
                f"{MAX_STREAMS} resumable calls are stored, the limit; leave out `resumable_s`", 1.0
            )
        entry = self._streams[key] = _ResumableStream(stream, keep_s)
        entry.task.add_done_callback(lambda task: self._ended(key, entry))
        self._schedule(key, entry)  # until a reader comes
        return self._read(key, entry, 0)

    def attach(self, key: Key, received: int) -> AsyncGenerator[T]:
        """The messages of a stored stream after the first `received`.

        Raises:
            NotFound: no stream of this id is stored.
            InvalidRequest: the stream has fewer messages than `received`.
        """
        entry = self._streams.get(key)
        if entry is None:
            raise NotFound(
                f"this gateway stores no call {key[1]!r}; send the request again with `resumed`"
            )
        if received > len(entry.messages):
            raise InvalidRequest(
                "received", f"`received`={received} exceeds the {len(entry.messages)} messages sent"
            )
        return self._read(key, entry, received)

    def stored(self, key: Key) -> Sequence[T] | None:
        """The messages of a stream so far; None when no stream of this id is stored."""
        entry = self._streams.get(key)
        return None if entry is None else entry.messages

    def drop(self, key: Key) -> None:
        """Cancel and drop a stream; does nothing when no stream of this id is stored."""
        entry = self._streams.get(key)
        if entry is not None:
            self._drop(key, entry)

    async def close(self) -> None:
        """Cancel and drop all streams."""
        streams, self._streams = self._streams, {}
        for entry in streams.values():
            entry.cancel()
        await asyncio.gather(*(entry.task for entry in streams.values()), return_exceptions=True)

    async def _read(self, key: Key, entry: _ResumableStream[T], position: int) -> AsyncGenerator[T]:
        entry.readers += 1
        entry.unschedule()
        try:
            while True:
                while position < len(entry.messages):
                    position += 1
                    yield entry.messages[position - 1]
                if entry.task.cancelled():
                    raise Unavailable("the gateway is stopping; resume the call at another gateway")
                if entry.task.done():
                    entry.task.result()  # raises the error of the stream, if any
                    return
                await entry.wait()
        finally:
            entry.readers -= 1
            self._schedule(key, entry)

    def _ended(self, key: Key, entry: _ResumableStream[T]) -> None:
        """Start the timer of a stream that has ended; a refused call leaves nothing to resume."""
        if entry.messages or entry.task.cancelled() or entry.task.exception() is None:
            self._schedule(key, entry)
        else:
            self._drop(key, entry)

    def _schedule(self, key: Key, entry: _ResumableStream[T]) -> None:
        """Start the timer of a stream without readers."""
        if self._streams.get(key) is entry and not entry.readers:
            entry.schedule(lambda: self._drop(key, entry))

    def _drop(self, key: Key, entry: _ResumableStream[T]) -> None:
        if self._streams.get(key) is entry:
            del self._streams[key]
            entry.cancel()


class _ResumableStream(Generic[T]):
    """A stream, its messages so far, and the readers that wait for more."""

    def __init__(self, stream: AsyncGenerator[T], keep_s: float) -> None:
        self.messages: list[T] = []
        self.readers = 0
        self.keep_s = keep_s
        self.task = asyncio.create_task(self._run(stream))
        self.task.add_done_callback(self._ended)
        self._waiters: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self) -> None:
        """Wait for the next message or the end."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def schedule(self, drop: Callable[[], None]) -> None:
        """Call `drop` after the stream's time."""
        self.unschedule()
        self._timer = asyncio.get_running_loop().call_later(self.keep_s, drop)

    def unschedule(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cancel(self) -> None:
        """Cancel the stream."""
        self.unschedule()
        self.task.cancel()

    async def _run(self, stream: AsyncGenerator[T]) -> None:
        async with aclosing(stream):
            async for message in stream:
                self.messages.append(message)
                self._wake()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # marks the error as retrieved; readers raise the error
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

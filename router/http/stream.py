"""Streams of messages over an HTTP response, and the end of streams when a client disconnects.

During a long prompt a stream is silent, and proxies would close the connection; comments, which
every reader of server-sent events skips, keep the connection alive. Knows ASGI and asynchronous
generators; knows nothing of the contents of messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

OUTERMOST = "outermost_send"
_AHEAD = 64
"""Most messages of several streams that wait for a slow client."""
FIRST_COMMENT_S = 2.0
"""Seconds after admission without a token before a comment is sent as the first byte."""
COMMENT_S = 10.0
"""Seconds of silence before the next comment."""
_COMMENT = b": still working\n\n"


class ClientGone(Exception):
    """The client closed the connection before the answer."""


class EventStream(Response):
    """Server-sent events; the end of the response, for any reason, closes events and source.

    Args:
        events: made from `first` and the later items of `source`.
        first: the task of the first item of `source`, from `start_stream`.
        source: the stream.
        headers: further headers of the answer.

    Sends each item from the request's own task; the framework's streaming response would use a task
    group for each. After the start of the response, events bypass the middleware and go to
    `scope["state"][OUTERMOST]`, if set.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        first: asyncio.Task[Any],
        source: AsyncGenerator[Any],
        headers: Mapping[str, str],
    ) -> None:
        plain = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**plain, **headers})
        del self.headers["content-length"]
        self._events, self._first, self._source = events, first, source
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until their end or until the client disconnects."""
        sending = asyncio.current_task()
        assert sending is not None, "an ASGI application runs in a task"
        disconnected = False

        async def watch() -> None:
            nonlocal disconnected
            while (await receive())["type"] != "http.disconnect":
                continue
            disconnected = True
            sending.cancel()

        watching = asyncio.create_task(watch())
        commenting: asyncio.Task[None] | None = None
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            send = scope.get("state", {}).get(OUTERMOST, send)
            commenting = asyncio.create_task(self._comment(send))
            async for event in self._events:
                self._num_sent += 1
                await send({"type": "http.response.body", "body": event, "more_body": True})
            commenting.cancel()
            watching.cancel()  # later messages belong to the next request
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not disconnected or sending.uncancel():
                raise
        finally:
            watching.cancel()
            if commenting is not None:
                commenting.cancel()
            await self._events.aclose()
            await _ended(self._first, self._source)

    async def _comment(self, send: Send) -> None:
        """Send a comment at once if no item is ready, and after each silence."""
        is_silent = not self._first.done()
        while True:
            if is_silent:
                await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
            num_before = self._num_sent
            await asyncio.sleep(COMMENT_S)
            is_silent = self._num_sent == num_before


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels `work` when the client disconnects.

    Raises:
        ClientGone: the client disconnected.
    """
    task = asyncio.create_task(work)
    disconnect = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Items of several streams as they arrive, with the number of the stream.

    Closing the iterator closes all streams.

    Raises:
        Exception: the first error of a stream.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(_AHEAD)

    async def pump(number: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((number, item))
        except Exception as error:  # the reader raises the error
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        ended = 0
        while ended < len(tasks):
            received = await queue.get()
            if isinstance(received, Exception):
                raise received
            if received is None:
                ended += 1
            else:
                yield received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:  # closes streams whose task was cancelled before its start
            await stream.aclose()


async def start_stream(stream: AsyncGenerator[T], accepted: asyncio.Event) -> asyncio.Task[T]:
    """Start a stream; returns the task of its first item once a refusal is ruled out.

    That is when the task is done, or `FIRST_COMMENT_S` seconds after the request was accepted. A
    refusal is raised and closes the stream.

    Args:
        stream: a stream that has not started.
        accepted: set when the request is admitted.
    """

    async def first_item() -> T:
        return await anext(stream)

    first = asyncio.create_task(first_item())
    waiting = asyncio.create_task(accepted.wait())
    try:
        await asyncio.wait({first, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            await asyncio.wait({first}, timeout=FIRST_COMMENT_S)
        if first.done():
            first.result()
    except BaseException:
        await _ended(first, stream)
        raise
    finally:
        waiting.cancel()
    return first


async def _ended(first: asyncio.Task[Any], stream: AsyncGenerator[Any]) -> None:
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await stream.aclose()

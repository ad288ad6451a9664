"""Streams of messages over one HTTP response, and what happens when its client goes away.

A stream that says nothing for long, since a long prompt is computed, would be taken for dead by
proxies: comments, which every reader of server-sent events skips, keep it alive. Knows ASGI and
asynchronous generators; knows nothing of what is in a message.
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
"""Messages of several streams that may wait for a client that reads slowly."""
FIRST_COMMENT_S = 2.0
"""An accepted request without a token so long after is answered by a comment, so that there is a
first byte."""
COMMENT_S = 10.0
"""A stream that was silent for so long gets another."""
_COMMENT = b": still working\n\n"


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


class EventStream(Response):
    """Server-sent events; whatever ends the response closes them and what they are made of.

    Args:
        events: made of `first` and what `source` gives after it.
        first: the task of the first item of `source`, as `begin` gives it.
        source: the stream.
        headers: more headers of the answer.

    Sends each item as it comes, from the request's own task: the framework's streaming response
    goes through a task group for each. Past the start of the response, middleware has nothing more
    to see, so events go round it, to `scope["state"][OUTERMOST]` where that is set.
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
        """Send the events, until they end or the client goes away."""
        sending = asyncio.current_task()
        assert sending is not None, "an ASGI application runs in a task"
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                continue
            gone = True
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
            watching.cancel()  # what is said after the end concerns the next request
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not gone or sending.uncancel():
                raise
        finally:
            watching.cancel()
            if commenting is not None:
                commenting.cancel()
            await self._events.aclose()
            await _ended(self._first, self._source)

    async def _comment(self, send: Send) -> None:
        """Send a comment at once where nothing else is ready, and after each silence."""
        is_silent = not self._first.done()
        while True:
            if is_silent:
                await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
            num_before = self._num_sent
            await asyncio.sleep(COMMENT_S)
            is_silent = self._num_sent == num_before


async def while_here(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientGone: it did.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """What the streams give as it comes, with the number of the stream; closing closes them all.

    Raises:
        Exception: the first that a stream raises.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    waiting: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(_AHEAD)

    async def pump(number: int, stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await waiting.put((number, item))
        except Exception as error:  # raised where the streams are read
            await waiting.put(error)
        else:
            await waiting.put(None)

    tasks = [asyncio.create_task(pump(number, one)) for number, one in enumerate(streams)]
    try:
        ended = 0
        while ended < len(tasks):
            got = await waiting.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                ended += 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:  # one whose task was cancelled before it began
            await stream.aclose()


async def begin(stream: AsyncGenerator[T], accepted: asyncio.Event) -> asyncio.Task[T]:
    """The task of a stream's first item, once it is clear that the answer is no refusal.

    It is done, or the request was accepted some seconds ago and is still at work. A refusal is
    raised, and closes the stream.

    Args:
        stream: not yet begun.
        accepted: set when the request's turn has come.
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

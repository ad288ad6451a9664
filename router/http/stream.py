"""Streams of messages over one HTTP response, and what happens when its client goes away.

Knows ASGI and asynchronous generators; knows nothing of what is in a message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

OUTERMOST = "outermost_send"
_AHEAD = 64
"""Messages of several streams that may wait for a client that reads slowly."""


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


class EventStream(Response):
    """Server-sent events; whatever ends the response closes `events`.

    Sends each item as it comes, from the request's own task: the framework's streaming response
    goes through a task group for each. Past the start of the response, middleware has nothing more
    to see, so events go round it, to `scope["state"][OUTERMOST]` where that is set.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

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
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            send = scope.get("state", {}).get(OUTERMOST, send)
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            watching.cancel()  # what is said after the end concerns the next request
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            if not gone or sending.uncancel():
                raise
        finally:
            watching.cancel()
            await self._events.aclose()


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


async def begin(stream: AsyncGenerator[T]) -> T:
    """A stream's first item, so that a refusal comes before any answer; closes it on that."""
    try:
        return await anext(stream)
    except BaseException:
        await stream.aclose()
        raise

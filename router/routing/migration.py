"""A request run to its end over groups that come and go: the driver of a `RequestProgress`.

When the group that computes it is lost, drains or ends the stream early, the request goes on in
another group of the same weights, or waits until there is one. Knows times and iterators; which
tokens are out and what to ask is the course's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from arriero.router.backend import Backend, GroupView
from arriero.router.routing.request_progress import RequestProgress, SubRequest
from arriero.shards.engine.types import SequenceOutput
from arriero.shards.errors import ArrieroError, Overloaded, Unavailable

log = logging.getLogger(__name__)

POLL_S = 0.05
RETRY_S = 1.0
"""A group that refused or lost the request is asked again no sooner."""


async def run(
    groups: Backend,
    course: RequestProgress,
    candidates: Callable[[], Sequence[GroupView]],
    lost_s: float,
) -> AsyncGenerator[list[SequenceOutput]]:
    """Run a course to its end; closing the iterator cancels it.

    Args:
        groups: run requests.
        course: the request.
        candidates: gives the groups that serve its model now.
        lost_s: how long it waits for a group that may go on, once its group was lost.

    Raises:
        InvalidRequest: a group refused it for what it is.
        Overloaded: every group is full, and nothing is out yet.
        Unavailable: no group could go on with it in time; the text is the first cause.
    """
    failed_s: dict[str, float] = {}
    lost: ArrieroError | None = None
    deadline_s = 0.0
    while not course.finished:
        now_s = time.monotonic()
        able = course.choices(candidates())
        fresh = [one for one in able if now_s - failed_s.get(one.group_id, -RETRY_S) >= RETRY_S]
        if not fresh:
            if lost is None:
                raise Unavailable(
                    "no group can hold this request now"
                    if course.digest is None
                    else "no group of the weights that gave the tokens in `resumed` serves now; "
                    "come back, or ask anew without `resumed`"
                )
            if isinstance(lost, Overloaded) and not course.started:
                raise lost
            if now_s >= deadline_s:
                raise Unavailable(f"{lost}; and no group went on with it within {lost_s:g} s")
            await asyncio.sleep(POLL_S)
            continue
        group = fresh[0]
        try:
            asks, source = course.asks(group, able), course.source
            if len(asks) == 1:
                ask = asks[0]
                async with aclosing(groups.generate(group.group_id, ask.request, source)) as steps:
                    async for outputs in steps:
                        lost = None
                        yield course.take(ask, group, outputs)
            else:
                async with aclosing(_all(groups, asks, group, source)) as arrivals:
                    async for ask, outputs in arrivals:
                        lost = None
                        yield course.take(ask, group, outputs)
            handed_over = course.started and any(ask.hands_over for ask in asks)
            if not course.finished and not handed_over:
                raise Unavailable("the group ended the stream before its last token")
        except (Unavailable, Overloaded) as error:
            now_s = time.monotonic()
            if lost is None:
                deadline_s = now_s + lost_s
            if lost is None or isinstance(lost, Overloaded):
                lost = error
            failed_s[group.group_id] = now_s
            course.moves += 1
            log.info("%s: group %s: %s; going on", course.request_id, group.group_id, error)


async def _all(
    groups: Backend, asks: Sequence[SubRequest], group: GroupView, source: str
) -> AsyncGenerator[tuple[SubRequest, list[SequenceOutput]]]:
    """What a group gives for several asks, as it comes, until it has given all or is lost."""
    arrived: asyncio.Queue[tuple[SubRequest, list[SequenceOutput] | Exception | None]] = (
        asyncio.Queue()
    )

    async def pump(ask: SubRequest) -> None:
        try:
            async with aclosing(groups.generate(group.group_id, ask.request, source)) as steps:
                async for outputs in steps:
                    arrived.put_nowait((ask, outputs))
        except Exception as error:
            arrived.put_nowait((ask, error))
        else:
            arrived.put_nowait((ask, None))

    pumps = [asyncio.create_task(pump(ask)) for ask in asks]
    try:
        running = len(pumps)
        while running:
            ask, got = await arrived.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                running -= 1
            else:
                yield ask, got
    finally:
        for one in pumps:
            one.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

"""Migration: runs a request to its end although groups come and go.

When the group that computes the request is lost, drains or ends the stream early, the request
goes on in another group of the same weights, or waits for such a group. Knows times and iterators;
knows nothing of tokens, which `RequestProgress` records.
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

Candidates = Callable[[], Sequence[GroupView]]

POLL_S = 0.05
RETRY_S = 1.0
"""Seconds before a group that refused or lost the request is tried again."""


async def run(
    groups: Backend, progress: RequestProgress, candidates: Candidates, lost_s: float
) -> AsyncGenerator[list[SequenceOutput]]:
    """Run a request to its end; closing the iterator cancels the request.

    Args:
        groups: groups of all models.
        progress: the request and its tokens so far.
        candidates: gives the groups that serve the model now.
        lost_s: seconds that a request waits for another group after the loss of its group.

    Raises:
        InvalidRequest: a group refused the request as invalid.
        Overloaded: all groups are full, and no token was sent yet.
        Unavailable: no group continued the request in time; the text is the first cause.
    """
    retry_s: dict[str, float] = {}  # by group that refused or lost the request
    lost: ArrieroError | None = None
    deadline_s = 0.0
    while not progress.finished:
        now_s = time.monotonic()
        able = progress.choices(candidates())
        ready = [group for group in able if now_s >= retry_s.get(group.group_id, 0.0)]
        if not ready:
            if lost is None:
                raise _no_group(progress)
            if isinstance(lost, Overloaded) and not progress.started:
                raise lost
            if now_s >= deadline_s:
                raise Unavailable(f"{lost}; no other group continued it within {lost_s:g} s")
            await asyncio.sleep(POLL_S)
            continue
        group = ready[0]
        log.debug("goes to group %s", group.group_id, extra={"request_id": progress.request_id})
        try:
            sub_requests, source = progress.sub_requests(group, able), progress.source
            if len(sub_requests) == 1:
                sub_request = sub_requests[0]
                stream = groups.generate(group.group_id, sub_request.request, source)
                async with aclosing(stream) as steps:
                    async for outputs in steps:
                        lost = None
                        yield progress.accept(sub_request, group, outputs)
            else:
                async with aclosing(_merged(groups, sub_requests, group, source)) as arrivals:
                    async for sub_request, outputs in arrivals:
                        lost = None
                        yield progress.accept(sub_request, group, outputs)
            handed_over = progress.started and any(sub.hands_over for sub in sub_requests)
            if not (progress.finished or handed_over):
                raise Unavailable("the group ended the stream before its last token")
        except (Unavailable, Overloaded) as error:
            now_s = time.monotonic()
            if lost is None:
                deadline_s = now_s + lost_s
            if lost is None or isinstance(lost, Overloaded):
                lost = error
            retry_s[group.group_id] = now_s + RETRY_S
            progress.num_migrations += 1
            log.info("%s: group %s: %s; migrates", progress.request_id, group.group_id, error)


def _no_group(progress: RequestProgress) -> Unavailable:
    """The error of a request that no group can start, or resume."""
    if progress.digest is None:
        return Unavailable("no group can hold this request now; try again later")
    return Unavailable(
        "no group with the weights that gave the tokens in `resumed` serves now; "
        "try again later, or send the request without `resumed`"
    )


async def _merged(
    groups: Backend, sub_requests: Sequence[SubRequest], group: GroupView, source: str
) -> AsyncGenerator[tuple[SubRequest, list[SequenceOutput]]]:
    """Outputs of several sub-requests in order of arrival, until all end or the group is lost."""
    arrived: asyncio.Queue[tuple[SubRequest, list[SequenceOutput] | Exception | None]] = (
        asyncio.Queue()
    )

    async def pump(sub_request: SubRequest) -> None:
        try:
            stream = groups.generate(group.group_id, sub_request.request, source)
            async with aclosing(stream) as steps:
                async for outputs in steps:
                    arrived.put_nowait((sub_request, outputs))
        except Exception as error:
            arrived.put_nowait((sub_request, error))
        else:
            arrived.put_nowait((sub_request, None))

    pumps = [asyncio.create_task(pump(sub_request)) for sub_request in sub_requests]
    try:
        running = len(pumps)
        while running:
            sub_request, outcome = await arrived.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                running -= 1
            else:
                yield sub_request, outcome
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

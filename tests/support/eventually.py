"""Wait until a condition holds, in place of a sleep that hopes so.

Knows clocks; knows nothing of what is awaited.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
EVERY_S = 0.01


def eventually(
    condition: Callable[[], T],
    within_s: float = 10.0,
    *,
    every_s: float = EVERY_S,
    state: Callable[[], object] | None = None,
) -> T:
    """Ask until the condition gives something true, and give that.

    Args:
        condition: cheap; asked at once, and every `every_s` seconds.
        within_s: how long it may take.
        every_s: seconds between two questions.
        state: shown where the time runs out.

    Raises:
        TimeoutError: the time ran out; an error of the condition itself passes.
    """
    deadline_s = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(_late(within_s, state))
        time.sleep(every_s)
    return value


async def eventually_async(
    condition: Callable[[], T],
    within_s: float = 10.0,
    *,
    every_s: float = EVERY_S,
    state: Callable[[], object] | None = None,
) -> T:
    """`eventually`, while the event loop goes on."""
    deadline_s = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(_late(within_s, state))
        await asyncio.sleep(every_s)
    return value


def _late(within_s: float, state: Callable[[], object] | None) -> str:
    return f"not within {within_s:g} s" + (f": {state()}" if state else "")

"""Retries of a call: when, and for how long.

A call is retried only after a refusal before any work: the gateway was overloaded, or no group
could serve. A stream that has started is never retried. Knows errors and time; knows nothing of
connections.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from arriero.shards.errors import Overloaded, Unavailable

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class Retry:
    """The attempts of a call.

    Args:
        retries: most attempts after the first.
        timeout_s: seconds for all attempts and waits together; None for no deadline.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        retries: int,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left = retries
        self._clock = clock
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._wait_s = FIRST_WAIT_S

    @property
    def timeout_s(self) -> float | None:
        """Seconds left for the next attempt; None without a deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._clock())

    def wait_s(self, error: Exception) -> float | None:
        """Seconds to wait before the next attempt; None for no further attempt.

        The wait doubles each time and is multiplied by a random factor of 1 to 2, so that clients
        refused together do not retry together; the wait is at least the gateway's `retry-after`.
        """
        if not isinstance(error, Overloaded | Unavailable) or self._left <= 0:
            return None
        self._left -= 1
        wait_s = self._wait_s * random.uniform(1.0, 2.0)
        if isinstance(error, Overloaded):
            wait_s = max(wait_s, error.retry_after_s)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        left_s = self.timeout_s
        return None if left_s is not None and wait_s >= left_s else wait_s

"""When a client tries again, and for how long: one object for each call.

Only refusals made before anything was computed for the caller are tried again: the gateway was
overloaded, or no group could serve. A stream that has begun is never tried again. Knows errors and
time; knows nothing of connections.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from arriero.shards.errors import Overloaded, Unavailable

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0


class Retry:
    """The attempts of one call.

    Args:
        retries: most attempts after the first.
        timeout_s: deadline of the call, all attempts and waits together; None for none.
        clock: seconds, monotonic.
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
        """What is left for the next attempt; None without a deadline."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._clock())

    def wait_s(self, error: Exception) -> float | None:
        """How long to wait before the next attempt; None when there is to be none.

        The waits double, with as much again by chance, so that clients which were refused together
        do not come back together; one that was told how long waits at least so long.
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

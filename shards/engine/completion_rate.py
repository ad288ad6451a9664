"""How often requests end: the estimate of when a place falls free."""

from __future__ import annotations

from collections.abc import Callable


class CompletionRate:
    """A running mean of the time between two ends; one second until the first two are seen.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None
        self._mean_s = 1.0

    def one_ended(self) -> None:
        """Note the end of a request."""
        now = self._clock()
        if self._last is not None:
            self._mean_s += 0.1 * (now - self._last - self._mean_s)
        self._last = now

    def seconds_for_one(self) -> float:
        """An estimate, 0.1 to 60 s."""
        return min(max(self._mean_s, 0.1), 60.0)

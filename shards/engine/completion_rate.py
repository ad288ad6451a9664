"""Rate at which requests end: an estimate of the wait for a free slot."""

from __future__ import annotations

from collections.abc import Callable


class CompletionRate:
    """Running mean of the time between two ends; 1 s before the second end.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None
        self._mean_s = 1.0

    def note_end(self) -> None:
        """Note the end of a request."""
        now = self._clock()
        if self._last is not None:
            self._mean_s += 0.1 * (now - self._last - self._mean_s)
        self._last = now

    def estimate_s(self) -> float:
        """Estimated seconds until the next end, 0.1 to 60."""
        return min(max(self._mean_s, 0.1), 60.0)

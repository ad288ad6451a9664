"""A rate limit that allows bursts: the token bucket, sans-I/O.

Knows amounts and times that are passed in; knows nothing of the unit that is counted.
"""

from __future__ import annotations


class Bucket:
    """Holds at most the amount of a minute and fills at a steady rate; starts full.

    Args:
        per_minute: amount that flows in per minute; also the capacity.
        now_s: monotonic time.
    """

    __slots__ = ("_at_s", "_level", "_most", "_per_s")

    def __init__(self, per_minute: float, now_s: float) -> None:
        self._most = per_minute
        self._per_s = per_minute / 60.0
        self._level = per_minute
        self._at_s = now_s

    def change(self, per_minute: float, now_s: float) -> None:
        """Fill at another rate from now on; the level, or the debt, stays."""
        if per_minute != self._most:
            self._fill(now_s)
            self._most, self._per_s = per_minute, per_minute / 60.0
            self._level = min(self._level, per_minute)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` can be taken; 0 for now.

        An amount above the capacity can be taken from a full bucket and leaves a debt.
        """
        self._fill(now_s)
        missing = min(amount, self._most) - self._level
        return missing / self._per_s if missing > 1e-9 else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`, if necessary into debt; a negative amount is given back."""
        self._fill(now_s)
        self._level = min(self._level - amount, self._most)

    def _fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._level = min(self._most, self._level + elapsed_s * self._per_s)
        self._at_s = now_s

"""A rate limit that allows bursts: the token bucket, sans-I/O.

Knows amounts and a clock that is passed in; knows nothing of what is counted.
"""

from __future__ import annotations


class Bucket:
    """Holds up to a minute's worth, and fills at a steady rate.

    Args:
        per_minute: what flows in, and the most it holds.
        now_s: the time; it begins full.
    """

    __slots__ = ("_at_s", "_level", "_most", "_per_s")

    def __init__(self, per_minute: float, now_s: float) -> None:
        self._most = per_minute
        self._per_s = per_minute / 60.0
        self._level = per_minute
        self._at_s = now_s

    def change(self, per_minute: float, now_s: float) -> None:
        """Fill at another rate from now on; what is in it, or owed, stays."""
        if per_minute != self._most:
            self._fill(now_s)
            self._most, self._per_s = per_minute, per_minute / 60.0
            self._level = min(self._level, per_minute)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` can be taken; 0 when it can now.

        More than the bucket ever holds can be taken from a full one, which is then in debt.
        """
        self._fill(now_s)
        missing = min(amount, self._most) - self._level
        return missing / self._per_s if missing > 1e-9 else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`, into debt if need be; a negative one gives back."""
        self._fill(now_s)
        self._level = min(self._level - amount, self._most)

    def _fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._at_s)
        self._level = min(self._most, self._level + elapsed_s * self._per_s)
        self._at_s = now_s

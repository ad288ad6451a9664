"""Progress of a group's loading, over all slices. Knows byte counts and time alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress of a group's loading, over all slices.

    Attributes:
        done: bytes packed.
        total: bytes to read, as far as slices reported; 0 before the first report.
        elapsed_s: seconds since the start of the group.
    """

    done: int
    total: int
    elapsed_s: float

    @property
    def share(self) -> float:
        """Loaded share of `total`, 0 to 1."""
        return self.done / self.total if self.total else 0.0

    def __str__(self) -> str:
        if not self.done:
            return "loading 0 %"
        rate = self.done / max(self.elapsed_s, 1e-3)
        percent = int(self.share * 100)
        return (
            f"loading {percent} %: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, "
            f"{rate / 1e9:.2f} GB/s, {(self.total - self.done) / rate:.0f} s left"
        )


LoadProgress = Callable[[Loading], None]
"""Callback for the progress of the group's loading."""

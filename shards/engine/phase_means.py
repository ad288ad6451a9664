"""Running means of the phases of a step.

Knows names and times; knows nothing of the phases.
"""

from __future__ import annotations


class PhaseMeans:
    """Running means of the phases of a step, over about the last hundred steps."""

    def __init__(self) -> None:
        self._mean_us: dict[str, float] = {}

    def note(self, phase: str, elapsed_ns: int) -> None:
        """Add the time of a phase."""
        elapsed_us = elapsed_ns / 1000
        mean = self._mean_us.get(phase, elapsed_us)
        self._mean_us[phase] = mean + 0.01 * (elapsed_us - mean)

    def snapshot(self) -> dict[str, float]:
        """Means by phase, in microseconds."""
        return dict(self._mean_us)

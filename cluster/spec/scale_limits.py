"""Limits of the autoscaler, from the spec."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleLimits:
    """Limits of `Autoscaler`.

    Attributes:
        least: smallest number of groups.
        most: largest number of groups.
        target: share of a group's sequences that should be in use, 0 to 1.
        wait_s: longest time in seconds that a request should wait in the queue.
        up_s: seconds of high load before groups are added.
        down_s: seconds of low load before groups are removed.
    """

    least: int
    most: int
    target: float
    wait_s: float
    up_s: float
    down_s: float

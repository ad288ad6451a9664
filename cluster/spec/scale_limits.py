"""Limits of the autoscaler, as a spec gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleLimits:
    """What the policy keeps to.

    Attributes:
        least, most: groups.
        target: share of a group's sequences that should be taken, 0 to 1.
        wait_s: the longest that a request should wait for its turn.
        up_s: how long more groups must be wanted before they come.
        down_s: how long fewer must do before they go.
    """

    least: int
    most: int
    target: float
    wait_s: float
    up_s: float
    down_s: float

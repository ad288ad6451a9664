"""The heartbeat of a slice: twice a second, the state of its main thread.

The message is the pair of the slice's rank and the heartbeat. Knows the state; knows nothing of
sockets or of how a leader judges a heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass

HEARTBEAT_PERIOD_S = 0.5
"""Seconds between two heartbeats of a slice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """State of a slice's main thread.

    Attributes:
        step: number of the current or last step.
        phase: phase of that step.
        waits_for: collective that blocks the main thread; "" while the thread computes.
        idle: whether the main thread waits for a plan.
        progress: count of waits and steps; an unchanged count means no progress.
        at_s: time of sending on the slice's own clock, in seconds.
        log: lines logged since the last heartbeat.
        on_device: whether the awaited work is queued on the device, which may compute for long.
    """

    step: int
    phase: str
    waits_for: str = ""
    idle: bool = False
    progress: int = 0
    at_s: float = 0.0
    log: tuple[str, ...] = ()
    on_device: bool = False

    @property
    def computes(self) -> bool:
        """Whether the slice, or its device, may be computing a long step."""
        return self.on_device or not (self.waits_for or self.idle)

"""The heartbeat of a slice: twice a second, what its main thread is doing.

Knows the message and its bytes; knows nothing of sockets or of how a leader judges it.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import msgpack

if TYPE_CHECKING:
    pass

HEARTBEAT_PERIOD_S = 0.5
"""Between two pulses of a slice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a slice's main thread does.

    Attributes:
        step: it works on, or worked on last.
        phase: of the step.
        waits_for: the collective it waits in; "" when it computes.
        idle: it waits for a plan.
        moves: counts its waits and steps up; an unchanged number means that it got no further.
        at_s: when it was sent, on the slice's own clock.
        log: lines that it logged since the pulse before.
        on_device: what it waits for is queued on its device, which may compute for long.
    """

    step: int
    phase: str
    waits_for: str = ""
    idle: bool = False
    moves: int = 0
    at_s: float = 0.0
    log: tuple[str, ...] = ()
    on_device: bool = False

    @property
    def computes(self) -> bool:
        """Whether the slice, or its device, may be at work on a long step."""
        return self.on_device or not (self.waits_for or self.idle)


def pack(rank: int, pulse: Heartbeat) -> bytes:
    """A pulse's bytes."""
    packed: bytes = msgpack.packb((rank, astuple(pulse)))
    return packed


def unpack(packed: bytes) -> tuple[int, Heartbeat]:
    """Undo `pack`: the rank and its pulse."""
    rank, (step, phase, waits_for, idle, moves, at_s, log, on_device) = msgpack.unpackb(packed)
    return rank, Heartbeat(
        step=step,
        phase=phase,
        waits_for=waits_for,
        idle=idle,
        moves=moves,
        at_s=at_s,
        log=tuple(log),
        on_device=on_device,
    )

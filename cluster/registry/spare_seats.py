"""The seats of spare groups: which group is ready, and which takes the place of a lost group.

Sans-I/O: the registry stores the seats. Knows seats, models and times; knows nothing of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from arriero.cluster.registry.snapshot import GroupEntry

PROMOTION_POLL_S = 2.0
"""Seconds between two questions of a spare group whether it is promoted."""


class SpareSeats:
    """All seats of spare groups.

    Args:
        stored: `seats` from before a restart.
        clock: monotonic time in seconds.

    Attributes:
        seats: model and revision of each seat, as JSON can carry them.
    """

    def __init__(
        self, stored: Mapping[str, list[Any]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seats = dict(stored)
        self._clock = clock
        self._polled_s: dict[str, float] = {}
        self._stands_in: dict[str, str] = {}  # promoted seat: lost seat, until it serves

    def __contains__(self, seat: str) -> bool:
        return seat in self.seats

    def must_wait(self, seat: str) -> bool:
        """Whether the start of a seat's group must wait: promoted groups need the cores first."""
        return seat in self.seats and bool(self._stands_in)

    def add(self, seat: str, model: str, revision: int) -> None:
        """Make a seat a spare."""
        self.seats[seat] = [model, revision]

    def promote(self, seat: str) -> bool:
        """Make a seat no spare; False when it was none."""
        self._polled_s.pop(seat, None)
        return self.seats.pop(seat, None) is not None

    def poll(self, seat: str) -> None:
        """Record that the group of a seat waits for its promotion now."""
        self._polled_s[seat] = self._clock()

    def standby(self) -> tuple[str, ...]:
        """Seats whose group is ready: it has asked for its promotion a short time ago."""
        limit_s = self._clock() - 2 * PROMOTION_POLL_S
        return tuple(seat for seat in self.seats if self._polled_s.get(seat, -math.inf) > limit_s)

    def take_over(self, lost: GroupEntry) -> str | None:
        """Seat whose group takes the place of a lost group; the lost seat becomes a spare.

        Returns:
            None when no group of the same model and revision is ready.
        """
        wanted = [lost.model, lost.revision]
        ready = [seat for seat in self.standby() if self.seats[seat] == wanted]
        if not ready:
            return None
        self.seats[lost.seat] = wanted
        self._stands_in[ready[0]] = lost.seat
        return ready[0]

    def serves(self, seat: str) -> str:
        """The group of a seat serves; returns the seat that it stands in for, by default itself."""
        return self._stands_in.pop(seat, seat)

    def failed(self, seat: str) -> None:
        """The group of a seat has failed: it stands in for no seat any more."""
        self._stands_in.pop(seat, None)

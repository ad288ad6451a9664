"""The groups that serve or drain, with leases, epochs and fences.

A *fenced* group was lost or replaced: its id is refused for all time. Sans-I/O: the registry stores
`epochs` and `fenced`, and kills processes. Knows entries and times; knows nothing of Ray.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

from arriero.cluster.registry.snapshot import GroupEntry

_KEEP_FENCED = 64


class GroupTable:
    """All groups that serve or drain.

    Args:
        epochs: last epoch of each seat, from before a restart.
        fenced: ids of the latest fenced groups, from before a restart.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        epochs: Mapping[str, int],
        fenced: Iterable[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs = dict(epochs)
        self.fenced = list(fenced)
        self._clock = clock
        self._entries: dict[str, GroupEntry] = {}
        self._expiry_s: dict[str, float] = {}
        self._renewed_s: dict[str, float] = {}

    @property
    def entries(self) -> tuple[GroupEntry, ...]:
        """The entries, oldest registration first."""
        return tuple(self._entries.values())

    def get(self, group_id: str) -> GroupEntry | None:
        """The entry of a group; None when the group is unknown."""
        return self._entries.get(group_id)

    def next_epoch(self, seat: str) -> int:
        """A new epoch for a seat."""
        epoch = self.epochs[seat] = self.epochs.get(seat, 0) + 1
        return epoch

    def refuses(self, entry: GroupEntry) -> bool:
        """Whether a group must end: it is fenced, or a newer group of its seat serves."""
        if entry.group_id in self.fenced:
            return True
        newer = any(group.epoch > entry.epoch for group in self._serving(entry.seat))
        return entry.phase == "serving" and newer

    def older(self, entry: GroupEntry) -> list[GroupEntry]:
        """Groups of the same seat that serve and that `entry` replaces."""
        return [group for group in self._serving(entry.seat) if group.epoch < entry.epoch]

    def renew(self, entry: GroupEntry, lease_s: float) -> None:
        """Add a group or renew its lease, which ends `lease_s` seconds from now."""
        now_s = self._clock()
        self._entries[entry.group_id] = entry
        self._expiry_s[entry.group_id] = now_s + lease_s
        self._renewed_s[entry.group_id] = now_s
        self.epochs[entry.seat] = max(entry.epoch, self.epochs.get(entry.seat, 0))

    def remove(self, group_id: str) -> GroupEntry | None:
        """Remove a group; returns its entry, or None when the group is unknown."""
        self._expiry_s.pop(group_id, None)
        self._renewed_s.pop(group_id, None)
        return self._entries.pop(group_id, None)

    def fence(self, group_id: str) -> None:
        """Remove a group and refuse its id from now on."""
        self.remove(group_id)
        self.fenced = [*self.fenced, group_id][-_KEEP_FENCED:]

    def silent_s(self, group_id: str) -> float:
        """Seconds since the last renewal of a group."""
        return self._clock() - self._renewed_s[group_id]

    def next_expiry_s(self) -> float:
        """Seconds until the next lease ends; infinite without a lease."""
        return min(self._expiry_s.values(), default=math.inf) - self._clock()

    def take_expired(self) -> list[GroupEntry]:
        """Groups whose lease has ended; each group is returned once, and stays in the table."""
        now_s = self._clock()
        expired = [group_id for group_id, at_s in self._expiry_s.items() if at_s <= now_s]
        for group_id in expired:
            del self._expiry_s[group_id]
        return [self._entries[group_id] for group_id in expired]

    def _serving(self, seat: str) -> list[GroupEntry]:
        return [
            group
            for group in self._entries.values()
            if group.seat == seat and group.phase == "serving"
        ]

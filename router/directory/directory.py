"""Which group holds how much of a prefix: sans-I/O.

Groups say what changed in numbered batches. One that is missing, or comes late, makes what is known
of its group doubtful: the group is asked for a snapshot, and until that is in what is known is used
as it is, since a wrong hint costs no more than a computed prefix. A group from which nothing came
within its lease holds nothing, at once; its bits are swept out of the table piece by piece, and
only then is its place given to another.

Knows keys, groups and a clock that it is told; knows nothing of messages' ways or of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from arriero.router.directory.events import Batch, Snapshot
from arriero.router.directory.table import MAX_HOLDERS, Keys, KeyTable

SWEEP_SLOTS = 1 << 20
"""Slots looked at in one go when a group's bits are taken out."""
PAGE_KEYS = 256
"""Keys looked up in one go at first, since most chains end soon; then each time four times more."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How many leading blocks of a chain a group holds.

    Attributes:
        near: on its device, from the first one on.
        total: in any of its tiers, from the first one on.
    """

    near: int
    total: int


@dataclass(slots=True)
class _Holder:
    """A group, while it is alive.

    Attributes:
        place: its bit.
        number: of its last batch or snapshot.
        expires_s: end of its lease.
        doubtful: a batch is missing: wait for a snapshot.
    """

    place: int
    number: int
    expires_s: float
    doubtful: bool


class Directory:
    """The directory of one model's groups, at most 64 at a time.

    Args:
        lease_s: how long a group is believed to hold what it held, without a word from it.
        capacity: keys that there is room for from the start.
    """

    def __init__(self, lease_s: float, capacity: int = 1024) -> None:
        self._lease_s = lease_s
        self._table = KeyTable(capacity)
        self._holders: dict[str, _Holder] = {}
        self._free = list(range(MAX_HOLDERS - 1, -1, -1))
        self._sweeping: dict[int, int] = {}  # place: the slot to go on from
        self._rebuilds = 0

    @property
    def nbytes(self) -> int:
        """Of the table."""
        return self._table.nbytes

    def __len__(self) -> int:
        return len(self._table)

    def groups(self) -> list[str]:
        """Those that are alive."""
        return list(self._holders)

    def snapshot(self, group: str, all_: Snapshot, now_s: float) -> bool:
        """Take all that a group holds, in place of what was known of it; False if there is no room.

        Args:
            group: its name; of each life another.
            all_: what it holds.
            now_s: a monotonic clock's.
        """
        self.drop(group)
        while not self._free and self.sweep():
            pass
        if not self._free:
            return False
        place = self._free.pop()
        self._table.reserve(all_.capacity)  # now, rather than in the middle of its changes
        self._table.change(all_.near, place, near=True, present=True)
        self._table.change(all_.far, place, near=False, present=True)
        self._holders[group] = _Holder(place, all_.number, now_s + self._lease_s, False)
        return True

    def apply(self, group: str, batch: Batch, now_s: float) -> bool:
        """Take a group's changes; False when it must be asked for a snapshot.

        A batch that was seen before is passed over.
        """
        holder = self._holders.get(group)
        if holder is None:
            return False
        holder.expires_s = now_s + self._lease_s
        if batch.number <= holder.number and not holder.doubtful:
            return True
        holder.doubtful |= batch.number != holder.number + 1
        if holder.doubtful:
            return False
        holder.number = batch.number
        self._table.change(batch.keys, holder.place, near=batch.near, present=batch.present)
        return True

    def renew(self, group: str, now_s: float) -> None:
        """There was a word from a group."""
        holder = self._holders.get(group)
        if holder is not None:
            holder.expires_s = now_s + self._lease_s

    def expire(self, now_s: float) -> list[str]:
        """Drop the groups whose lease has ended; gives them."""
        gone = [name for name, one in self._holders.items() if one.expires_s <= now_s]
        for name in gone:
            self.drop(name)
        return gone

    def drop(self, group: str) -> None:
        """A group holds nothing any more; safe when it is not known."""
        holder = self._holders.pop(group, None)
        if holder is not None:
            self._sweeping[holder.place] = 0

    def sweep(self, slots: int = SWEEP_SLOTS) -> bool:
        """Go on taking dropped groups' bits out; True while some are left."""
        if self._table.num_rebuilds != self._rebuilds:  # slots have moved: begin again
            self._rebuilds = self._table.num_rebuilds
            self._sweeping = dict.fromkeys(self._sweeping, 0)
        while self._sweeping and slots > 0:
            place, start = next(iter(self._sweeping.items()))
            most = min(slots, SWEEP_SLOTS)
            following = self._table.drop(place, start, most)
            slots -= most
            if following:
                self._sweeping[place] = following
            else:
                del self._sweeping[place]
                self._free.append(place)
        return bool(self._sweeping)

    def lookup(self, chain: Keys) -> Mapping[str, Reach]:
        """How much of a chain each group holds; those that hold nothing are left out.

        Args:
            chain: [N] first 8 bytes of a prompt's block keys, from the first block on.
        """
        alive = np.uint64(sum(1 << one.place for one in self._holders.values()))
        held_near, held_any = alive, alive
        near: dict[int, int] = {}
        total: dict[int, int] = {}
        start, page = 0, PAGE_KEYS
        while start < len(chain) and held_any:
            on_device, below = self._table.find(chain[start : start + page])
            held_near = _follow(held_near, on_device, start, near)
            held_any = _follow(held_any, on_device | below, start, total)
            start, page = start + page, 4 * page
        for bits, ends in ((held_near, near), (held_any, total)):
            for place in _places(bits):
                ends[place] = len(chain)
        return {
            name: Reach(near.get(one.place, 0), total[one.place])
            for name, one in self._holders.items()
            if total.get(one.place)
        }


def _follow(held: np.uint64, bits: Keys, start: int, ends: dict[int, int]) -> np.uint64:
    """Who still holds the chain after these keys; notes where the others' part of it ended."""
    run = np.bitwise_and.accumulate(np.concatenate(([held], bits)))
    for at in np.flatnonzero(run[1:] != run[:-1]):
        for place in _places(run[at] & ~run[at + 1]):
            ends[place] = start + int(at)
    return np.uint64(run[-1])


def _places(bits: np.uint64) -> list[int]:
    value, found = int(bits), []
    while value:
        low = value & -value
        found.append(low.bit_length() - 1)
        value ^= low
    return found

"""The directory: the length of a prefix in the cache of each group. Sans-I/O.

Groups report changes in numbered batches. After a missing or late batch the entry of a group is
stale: the gateway needs a snapshot of the group. Until the snapshot arrives the stale entry stays
in use, since a wrong hint costs no more than one computed prefix. A group whose lease ends has no
blocks from that moment on; `sweep` clears its bits in the table in chunks, and only then another
group may get the same bit.

Knows keys, groups and times given by the caller; knows nothing of links or prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from arriero.router.directory.events import Batch, Snapshot
from arriero.router.directory.table import MAX_HOLDERS, Keys, KeyTable, Mask

SWEEP_SLOTS = 1 << 20
"""Slots per chunk when the bits of a dropped group are cleared."""
PAGE_KEYS = 256
"""Keys in the first lookup of a chain, since most chains end early; then 4 x as many each time."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Number of leading blocks of a chain in a group.

    Attributes:
        near: leading blocks on the device.
        total: leading blocks in any tier.
    """

    near: int
    total: int


@dataclass(slots=True)
class _Holder:
    """A live group.

    Attributes:
        bit: bit of the group in the table, 0 to 63.
        number: number of the last batch or snapshot.
        expires_s: end of the lease.
        stale: a batch is missing; only a snapshot helps.
    """

    bit: int
    number: int
    expires_s: float
    stale: bool


class Directory:
    """The directory of one model's groups, at most 64 at a time.

    Args:
        lease_s: seconds without a message after which the blocks of a group no longer count.
        capacity: initial number of keys.
    """

    def __init__(self, lease_s: float, capacity: int = 1024) -> None:
        self._lease_s = lease_s
        self._table = KeyTable(capacity)
        self._holders: dict[str, _Holder] = {}
        self._free = list(range(MAX_HOLDERS - 1, -1, -1))
        self._sweeping: dict[int, int] = {}  # bit: next slot to clear
        self._rebuilds = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self._table.nbytes

    def __len__(self) -> int:
        return len(self._table)

    def groups(self) -> list[str]:
        """Names of the live groups."""
        return list(self._holders)

    def snapshot(self, group: str, snapshot: Snapshot, now_s: float) -> bool:
        """Replace the blocks of a group by a snapshot; False when 64 groups are known already.

        Args:
            group: name of the group; a restarted group has a new name.
            snapshot: all blocks of the group.
            now_s: monotonic time.
        """
        self.drop(group)
        while not self._free and self.sweep():
            pass
        if not self._free:
            return False
        bit = self._free.pop()
        self._table.reserve(snapshot.capacity)  # grow now rather than between later changes
        self._table.change(snapshot.near, bit, near=True, present=True)
        self._table.change(snapshot.far, bit, near=False, present=True)
        self._holders[group] = _Holder(bit, snapshot.number, now_s + self._lease_s, False)
        return True

    def apply(self, group: str, batch: Batch, now_s: float) -> bool:
        """Apply a batch of changes; False when the group must send a snapshot.

        Ignores a batch that was applied before.
        """
        holder = self._holders.get(group)
        if holder is None:
            return False
        holder.expires_s = now_s + self._lease_s
        if batch.number <= holder.number and not holder.stale:
            return True
        holder.stale |= batch.number != holder.number + 1
        if holder.stale:
            return False
        holder.number = batch.number
        self._table.change(batch.keys, holder.bit, near=batch.near, present=batch.present)
        return True

    def expire(self, now_s: float) -> list[str]:
        """Drop the groups whose lease has ended; gives their names."""
        gone = [name for name, holder in self._holders.items() if holder.expires_s <= now_s]
        for name in gone:
            self.drop(name)
        return gone

    def drop(self, group: str) -> None:
        """Remove a group; does nothing when the group is unknown."""
        holder = self._holders.pop(group, None)
        if holder is not None:
            self._sweeping[holder.bit] = 0

    def sweep(self, slots: int = SWEEP_SLOTS) -> bool:
        """Clear bits of dropped groups in up to `slots` slots; True while bits are left."""
        if self._table.num_rebuilds != self._rebuilds:  # keys have new slots: start over
            self._rebuilds = self._table.num_rebuilds
            self._sweeping = dict.fromkeys(self._sweeping, 0)
        while self._sweeping and slots > 0:
            bit, start = next(iter(self._sweeping.items()))
            count = min(slots, SWEEP_SLOTS)
            next_start = self._table.drop(bit, start, count)
            slots -= count
            if next_start:
                self._sweeping[bit] = next_start
            else:
                del self._sweeping[bit]
                self._free.append(bit)
        return bool(self._sweeping)

    def lookup(self, chain: Keys) -> Mapping[str, Reach]:
        """Leading blocks of a chain by group; groups without the first block are left out.

        Args:
            chain: [N] first 8 bytes of a prompt's block keys, from the first block on.
        """
        alive = np.uint64(sum(1 << holder.bit for holder in self._holders.values()))
        all_near, all_any = alive, alive
        near: dict[int, int] = {}
        total: dict[int, int] = {}
        start, page = 0, PAGE_KEYS
        while start < len(chain) and all_any:
            on_device, below = self._table.find(chain[start : start + page])
            all_near = _follow(all_near, on_device, start, near)
            all_any = _follow(all_any, on_device | below, start, total)
            start, page = start + page, 4 * page
        for word, ends in ((all_near, near), (all_any, total)):
            for bit in _set_bits(word):
                ends[bit] = len(chain)
        return {
            name: Reach(near.get(holder.bit, 0), total[holder.bit])
            for name, holder in self._holders.items()
            if total.get(holder.bit)
        }

    def holders(self, keys: Keys) -> Mapping[str, tuple[Mask, Mask]]:
        """By group: [N] keys on the device, and [N] keys in host memory or on disk.

        Args:
            keys: [N] first 8 bytes of block keys.
        """
        near, far = self._table.find(keys)
        by_group: dict[str, tuple[Mask, Mask]] = {}
        for name, holder in self._holders.items():
            bit = np.uint64(1 << holder.bit)
            by_group[name] = ((near & bit) != 0, (far & bit) != 0)
        return by_group


def _follow(holders: np.uint64, bits: Keys, start: int, ends: dict[int, int]) -> np.uint64:
    """The holders of all keys so far; records in `ends` where the chain of other holders ends."""
    run = np.bitwise_and.accumulate(np.concatenate(([holders], bits)))
    for at in np.flatnonzero(run[1:] != run[:-1]):
        for bit in _set_bits(run[at] & ~run[at + 1]):
            ends[bit] = start + int(at)
    return np.uint64(run[-1])


def _set_bits(word: np.uint64) -> list[int]:
    value, bits = int(word), []
    while value:
        low = value & -value
        bits.append(low.bit_length() - 1)
        value ^= low
    return bits

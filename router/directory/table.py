"""Which of up to 64 holders have which keys: a hash table in three arrays, worked on in batches.

Open addressing with linear probing (Knuth, TAOCP 3, 6.4), every step of it done for a whole batch
by numpy. A slot takes 24 bytes: the key's first 8 bytes, a bit for each holder that has the block
on its device, and one for each that has it in host memory or on disk. At most 70 % of the slots
are in use, so a key takes 34 bytes whoever holds it (43 when the table has just grown). Two keys
that share 8 bytes are taken for one; among 100 million keys a pair does so once in 3,700 tables,
and a wrong hint costs a computed prefix, no wrong token.

Knows keys and bits; knows nothing of groups, time or messages.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""First 8 bytes of block keys, little-endian; 0 never comes (it is taken for 1)."""
Bits = npt.NDArray[np.uint64]

MAX_HOLDERS = 64
SLOT_BYTES = 24
_LOAD = 0.7
_HALF = np.uint64(32)
_ONE = np.uint64(1)


def fingerprints(keys: bytes, width: int = 16) -> Keys:
    """The first 8 bytes of each of the keys, which lie one after the other."""
    whole = np.frombuffer(keys, dtype="<u8").reshape(-1, width // 8)
    found: Keys = np.maximum(whole[:, 0], _ONE)
    return found


class KeyTable:
    """The table.

    Args:
        capacity: keys that it must hold before it grows.

    Attributes:
        num_rebuilds: how often keys have changed their slots.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._count = 0  # slots in use, of dead keys too
        self.num_rebuilds = 0
        self._make(int(capacity / _LOAD) + 1)

    def _make(self, size: int) -> None:
        self._size = np.uint64(size)
        self._keys = np.zeros(size, dtype=np.uint64)
        self._near = np.zeros(size, dtype=np.uint64)
        self._far = np.zeros(size, dtype=np.uint64)

    def __len__(self) -> int:
        """Slots in use; some may be of keys that nobody holds any more."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self._keys.nbytes * 3

    def find(self, keys: Keys) -> tuple[Bits, Bits]:
        """Holders of each key, [N] and [N]: on the device, and below it; 0 where unknown."""
        at, found = self._search(keys)
        known = found == keys
        return self._near[at] * known, self._far[at] * known

    def change(self, keys: Keys, holder: int, *, near: bool, present: bool) -> None:
        """Note that a holder has keys, or has them no more.

        Args:
            keys: [N], any number of times each.
            holder: 0 to 63.
            near: on its device, else below.
            present: whether it has them.
        """
        if not len(keys):
            return
        bit = _ONE << np.uint64(holder)
        if present:
            at = self._insert(keys)
            bits = self._near if near else self._far  # which are others once the table has grown
            bits[at] |= bit
        else:
            at, found = self._search(keys)
            at = at[found == keys]
            bits = self._near if near else self._far
            bits[at] &= ~bit

    def held(self, holder: int) -> tuple[Keys, Keys]:
        """All keys that a holder has on its device, and below it."""
        bit = _ONE << np.uint64(holder)
        return self._keys[(self._near & bit) != 0], self._keys[(self._far & bit) != 0]

    def drop(self, holder: int, start: int, most: int) -> int:
        """Take a holder out of `most` slots from `start` on; gives the next start, or 0 at the end.

        In pieces, so that nothing waits for a walk through gigabytes.
        """
        keep = ~(_ONE << np.uint64(holder))
        end = min(start + most, len(self._keys))
        self._near[start:end] &= keep
        self._far[start:end] &= keep
        return 0 if end == len(self._keys) else end

    def _home(self, keys: Keys) -> npt.NDArray[np.int64]:
        # keys are hashes, so their upper halves are even: scaled to the table's size
        return (((keys >> _HALF) * self._size) >> _HALF).astype(np.int64)

    def _search(self, keys: Keys) -> tuple[npt.NDArray[np.int64], Keys]:
        """Slot of each key, or the empty one where it would be; and what is in it."""
        at, size = self._home(keys), len(self._keys)
        found = self._keys[at]
        left = np.flatnonzero((found != keys) & (found != 0))
        while len(left):
            following = at[left] + 1
            following[following == size] = 0
            there = self._keys[following]
            at[left], found[left] = following, there
            left = left[(there != keys[left]) & (there != 0)]
        return at, found

    def _insert(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Slot of each key, which is there from now on."""
        at, found = self._search(keys)
        new = np.flatnonzero(found == 0)
        if self._count + len(new) > _LOAD * len(self._keys):
            self.reserve(len(keys))
            at, found = self._search(keys)
            new = np.flatnonzero(found == 0)
        while len(new):
            # of several keys that claim a slot the last one written has it; the others look on
            self._keys[at[new]] = keys[new]
            lost = new[self._keys[at[new]] != keys[new]]
            self._count += len(np.unique(at[new]))
            at[lost], found = self._search(keys[lost])
            new = lost[found == 0]
        return at

    def reserve(self, more: int) -> None:
        """Have room for so many more keys: leave dead ones behind, and grow if that is too little.

        Takes some tenths of a second for a million keys.
        """
        if self._count + more <= _LOAD * len(self._keys):
            return
        alive = np.flatnonzero(self._near | self._far)
        keys, near, far = self._keys[alive], self._near[alive], self._far[alive]
        needed = int((len(keys) + more) / _LOAD) + 1
        self._make(len(self._keys) if needed < 0.8 * len(self._keys) else needed * 5 // 4)
        self._count = 0
        self.num_rebuilds += 1
        at = self._insert(keys)
        self._near[at], self._far[at] = near, far

"""Which of up to 64 holders have which keys: a hash table in two arrays, worked on in batches.

Buckets of eight keys, a cache line each, of the keys' first 8 bytes; a full one goes over into the
next (Knuth, TAOCP 3, 6.4, linear probing with buckets). Beside them lie two words a key: a bit for
each holder that has the block on its device, and one for each that has it in host memory or on
disk. So a key costs two cache misses, and those of a batch overlap: every step is done for the
whole batch by numpy. At most 70 % of the slots are in use, so a key takes 34 bytes whoever holds it
(43 when the table has just grown). Two keys that share 8 bytes are taken for one; among 100 million
keys a pair does so once in 3,700 tables, and a wrong hint costs a computed prefix, no wrong token.

Knows keys and bits; knows nothing of groups, time or messages.

Shape legend: N keys of a batch, B buckets, W keys of a bucket. A key's place is its slot, 0 to B W.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""First 8 bytes of block keys, little-endian; 0 never comes (it is taken for 1)."""
Bits = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MAX_HOLDERS = 64
SLOT_BYTES = 24
_WIDTH = 8
_NEAR, _FAR = 0, 1
_NOWHERE = -1
_PIECE = 1 << 20
"""Slots of a table that grows whose keys are put over at once."""
_LOAD = 0.7
_HALF = np.uint64(32)
_ONE = np.uint64(1)
_FREE = np.uint64(0)


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
        self._make(capacity)

    def _make(self, capacity: int) -> None:
        self._buckets = int(capacity / (_LOAD * _WIDTH)) + 1
        self._keys = np.zeros((self._buckets, _WIDTH), dtype=np.uint64)  # [B, W]; 0 is free
        self._holders = np.zeros((self._buckets * _WIDTH, 2), dtype=np.uint64)  # [B W, 2]

    def __len__(self) -> int:
        """Slots in use; some may be of keys that nobody holds any more."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Of the arrays."""
        return self._keys.nbytes + self._holders.nbytes

    def find(self, keys: Keys) -> tuple[Bits, Bits]:
        """Holders of each key, [N] and [N]: on the device, and below it; 0 where unknown."""
        at = self._search(keys)
        known = at != _NOWHERE
        if not known.all():
            at = np.where(known, at, 0)
        found = self._holders.take(at, axis=0)
        return found[:, _NEAR] * known, found[:, _FAR] * known

    def change(self, keys: Keys, holder: int, *, near: Mask | bool, present: Mask | bool) -> None:
        """Note that a holder has keys, or has them no more, one change after the other.

        Args:
            keys: [N], any number of times each.
            holder: 0 to 63.
            near: [N], or of all: on its device, else below.
            present: [N], or of all: whether it has them from now on.
        """
        if not len(keys):
            return
        present = np.broadcast_to(np.asarray(present), keys.shape)
        at = self._search(keys)
        if (present & (at == _NOWHERE)).any():
            if self.reserve(len(keys)):  # which may have left some of them behind
                at = self._search(keys)
            self._insert(np.unique(keys[present & (at == _NOWHERE)]))
            at = self._search(keys)
        words = 2 * at + np.where(near, _NEAR, _FAR)
        known = at != _NOWHERE
        if not known.all():
            words, present = words[known], present[known]
        holders = self._holders.reshape(-1)
        bit = _ONE << np.uint64(holder)
        # No bit but the holder's changes, so of a word that is written twice the last value stands.
        holders[words] = holders.take(words) & ~bit | np.where(present, bit, _FREE)

    def held(self, holder: int) -> tuple[Keys, Keys]:
        """All keys that a holder has on its device, and below it."""
        bit = _ONE << np.uint64(holder)
        keys, held = self._keys.reshape(-1), (self._holders & bit) != 0
        return keys[held[:, _NEAR]], keys[held[:, _FAR]]

    def drop(self, holder: int, start: int, most: int) -> int:
        """Take a holder out of `most` slots from `start` on; gives the next start, or 0 at the end.

        In pieces, so that nothing waits for a walk through gigabytes.
        """
        keep = ~(_ONE << np.uint64(holder))
        end = min(start + most, len(self._holders))
        self._holders[start:end] &= keep
        return 0 if end == len(self._holders) else end

    def reserve(self, more: int) -> bool:
        """Have room for so many more keys: leave dead ones behind, and grow if that is too little.

        Takes some tenths of a second for a million keys. Gives whether keys have moved.
        """
        if self._count + more <= _LOAD * _WIDTH * self._buckets:
            return False
        keys, holders = self._keys.reshape(-1), self._holders
        had = int(_LOAD * _WIDTH * self._buckets)
        needed = int(np.count_nonzero(holders[:, _NEAR] | holders[:, _FAR])) + more
        self._make(had if needed < 0.8 * had else needed * 5 // 4)
        self._count = 0
        self.num_rebuilds += 1
        for start in range(0, len(keys), _PIECE):
            piece = holders[start : start + _PIECE]
            alive = piece.any(axis=1)
            at = self._insert(keys[start : start + _PIECE][alive])
            self._holders[at] = piece[alive]
        return True

    def _home(self, keys: Keys) -> Places:
        # keys are hashes, so their upper halves are even: scaled to the table's size
        return (((keys >> _HALF) * np.uint64(self._buckets)) >> _HALF).astype(np.int64)

    def _search(self, keys: Keys) -> Places:
        """Where each key is, or `_NOWHERE`."""
        buckets, left = self._home(keys), None
        at = np.empty(0, dtype=np.int64)
        while True:
            lines = self._keys.take(buckets, axis=0)
            # A key is in its bucket once at most: as a word of eight bytes, the comparison is a
            # power of 256, or 0. Of 0 less 1 all bits count: 64 // 8 is past every slot.
            hits = (lines == keys[:, None]).view("<u8")[:, 0]
            slots = (np.bitwise_count(hits - _ONE) >> 3).astype(np.int64)
            found = np.where(slots < _WIDTH, _WIDTH * buckets + slots, _NOWHERE)
            if left is None:
                at = found
            else:
                at[left] = found
            full = np.flatnonzero((lines[:, -1] != _FREE) & (found == _NOWHERE))
            if not len(full):
                return at
            left = full if left is None else left[full]
            keys, buckets = keys[full], (buckets[full] + 1) % self._buckets

    def _insert(self, keys: Keys) -> Places:
        """Put in keys, each once, that are not there and that there is room for; where they are."""
        at = np.empty(len(keys), dtype=np.int64)
        left, buckets = np.arange(len(keys)), self._home(keys)
        while len(left):
            order = np.argsort(buckets, kind="stable")
            left, buckets = left[order], buckets[order]
            begins = np.flatnonzero(np.diff(buckets, prepend=-1))  # of keys for one bucket
            turn = np.arange(len(left)) - np.repeat(begins, np.diff(begins, append=len(left)))
            used = np.count_nonzero(self._keys.take(buckets, axis=0), axis=1)
            fits = used + turn < _WIDTH
            chosen = left[fits]
            at[chosen] = _WIDTH * buckets[fits] + (used + turn)[fits]
            self._keys.reshape(-1)[at[chosen]] = keys[chosen]
            left, buckets = left[~fits], (buckets[~fits] + 1) % self._buckets
        self._count += len(keys)
        return at

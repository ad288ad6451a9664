"""The keys of up to 64 holders: a hash table in two arrays with batched operations.

A bucket is a cache line of eight keys (the first 8 bytes of each); keys that find a bucket full go
to the next bucket (Knuth, TAOCP 3, 6.4, linear probing with buckets). A second array has two words
for each key: one bit per holder with the block on its device, and one bit per holder with the block
in host memory or on disk. So a key costs two cache misses, and the misses of a batch overlap: numpy
does each step for the whole batch. At most 70 % of the slots are in use, so a key takes 34 bytes
for any number of holders (43 bytes right after the table has grown). Two keys with the same first 8
bytes count as the same key; among 100 million keys that happens once in 3,700 tables, and a wrong
hint costs a computed prefix, no wrong token.

Knows keys and bits; knows nothing of groups, time or messages.

Shape legend: N keys of a batch, B buckets, W keys of a bucket. Slots are numbered from 0 to B W.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""First 8 bytes of block keys, little-endian; 0 is replaced by 1, since 0 marks a free slot."""
Bits = npt.NDArray[np.uint64]
Slots = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MAX_HOLDERS = 64
SLOT_BYTES = 24
_WIDTH = 8
_NEAR, _FAR = 0, 1
_NOWHERE = -1
_CHUNK_SLOTS = 1 << 20
"""Slots per step when keys are copied to a new table."""
_LOAD = 0.7
_HALF = np.uint64(32)
_ONE = np.uint64(1)
_FREE = np.uint64(0)


def fingerprints(keys: bytes, width: int = 16) -> Keys:
    """The first 8 bytes of each key; `keys` are concatenated keys of `width` bytes each."""
    whole = np.frombuffer(keys, dtype="<u8").reshape(-1, width // 8)
    prints: Keys = np.maximum(whole[:, 0], _ONE)
    return prints


class KeyTable:
    """The table.

    Args:
        capacity: number of keys before the table grows.

    Attributes:
        num_rebuilds: number of rebuilds; each gives the keys new slots.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._count = 0  # slots in use, dead keys included
        self.num_rebuilds = 0
        self._make(capacity)

    def _make(self, capacity: int) -> None:
        self._buckets = int(capacity / (_LOAD * _WIDTH)) + 1
        self._keys = np.zeros((self._buckets, _WIDTH), dtype=np.uint64)  # [B, W]; 0 is free
        self._holders = np.zeros((self._buckets * _WIDTH, 2), dtype=np.uint64)  # [B W, 2]

    def __len__(self) -> int:
        """Number of slots in use; includes keys that have lost all holders."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._keys.nbytes + self._holders.nbytes

    def find(self, keys: Keys) -> tuple[Bits, Bits]:
        """Holders of each key on the device, [N], and below the device, [N]; 0 for unknown keys."""
        at = self._search(keys)
        known = at != _NOWHERE
        if not known.all():
            at = np.where(known, at, 0)
        words = self._holders.take(at, axis=0)
        return words[:, _NEAR] * known, words[:, _FAR] * known

    def change(self, keys: Keys, holder: int, *, near: Mask | bool, present: Mask | bool) -> None:
        """Record changes of a holder's keys in the order given.

        Args:
            keys: [N]; a key may occur several times.
            holder: 0 to 63.
            near: [N] or a single value: the change concerns the device, else the tiers below.
            present: [N] or a single value: the holder has the key after the change.
        """
        if not len(keys):
            return
        present = np.broadcast_to(np.asarray(present), keys.shape)
        at = self._search(keys)
        if (present & (at == _NOWHERE)).any():
            if self.reserve(len(keys)):  # a rebuild gives keys new slots
                at = self._search(keys)
            self._insert(np.unique(keys[present & (at == _NOWHERE)]))
            at = self._search(keys)
        words = 2 * at + np.where(near, _NEAR, _FAR)
        known = at != _NOWHERE
        if not known.all():
            words, present = words[known], present[known]
        holders = self._holders.reshape(-1)
        bit = _ONE << np.uint64(holder)
        # Only the holder's bit changes, so the last write to a word is the right value.
        holders[words] = holders.take(words) & ~bit | np.where(present, bit, _FREE)

    def keys_of(self, holder: int) -> tuple[Keys, Keys]:
        """All keys of a holder on the device, and below the device."""
        bit = _ONE << np.uint64(holder)
        keys, present = self._keys.reshape(-1), (self._holders & bit) != 0
        return keys[present[:, _NEAR]], keys[present[:, _FAR]]

    def drop(self, holder: int, start: int, count: int) -> int:
        """Clear a holder in `count` slots from `start` on; gives the next start, or 0 at the end.

        Chunks keep the event loop free: a table may have gigabytes.
        """
        keep = ~(_ONE << np.uint64(holder))
        end = min(start + count, len(self._holders))
        self._holders[start:end] &= keep
        return 0 if end == len(self._holders) else end

    def reserve(self, more: int) -> bool:
        """Make room for `more` keys: removes dead keys, and grows the table if that is too little.

        Takes some tenths of a second for a million keys. Gives whether keys have new slots.
        """
        if self._count + more <= _LOAD * _WIDTH * self._buckets:
            return False
        keys, holders = self._keys.reshape(-1), self._holders
        capacity = int(_LOAD * _WIDTH * self._buckets)
        needed = int(np.count_nonzero(holders[:, _NEAR] | holders[:, _FAR])) + more
        self._make(capacity if needed < 0.8 * capacity else needed * 5 // 4)
        self._count = 0
        self.num_rebuilds += 1
        for start in range(0, len(keys), _CHUNK_SLOTS):
            chunk = holders[start : start + _CHUNK_SLOTS]
            alive = chunk.any(axis=1)
            at = self._insert(keys[start : start + _CHUNK_SLOTS][alive])
            self._holders[at] = chunk[alive]
        return True

    def _home(self, keys: Keys) -> Slots:
        # keys are hashes: the upper halves are uniform, and are scaled to the number of buckets
        return (((keys >> _HALF) * np.uint64(self._buckets)) >> _HALF).astype(np.int64)

    def _search(self, keys: Keys) -> Slots:
        """Slot of each key, or `_NOWHERE`."""
        buckets, left = self._home(keys), None
        at = np.empty(0, dtype=np.int64)
        while True:
            lines = self._keys.take(buckets, axis=0)
            # A bucket contains a key at most once, so the eight comparison bytes, read as a word,
            # are a power of 256 or 0. 0 - 1 has 64 bits set, and 64 // 8 is past every slot.
            hits = (lines == keys[:, None]).view("<u8")[:, 0]
            slots = (np.bitwise_count(hits - _ONE) >> 3).astype(np.int64)
            hit_slots = np.where(slots < _WIDTH, _WIDTH * buckets + slots, _NOWHERE)
            if left is None:
                at = hit_slots
            else:
                at[left] = hit_slots
            full = np.flatnonzero((lines[:, -1] != _FREE) & (hit_slots == _NOWHERE))
            if not len(full):
                return at
            left = full if left is None else left[full]
            keys, buckets = keys[full], (buckets[full] + 1) % self._buckets

    def _insert(self, keys: Keys) -> Slots:
        """Insert distinct new keys, for which there must be room; gives the slots."""
        at = np.empty(len(keys), dtype=np.int64)
        left, buckets = np.arange(len(keys)), self._home(keys)
        while len(left):
            order = np.argsort(buckets, kind="stable")
            left, buckets = left[order], buckets[order]
            starts = np.flatnonzero(np.diff(buckets, prepend=-1))  # first new key of each bucket
            index = np.arange(len(left)) - np.repeat(starts, np.diff(starts, append=len(left)))
            used = np.count_nonzero(self._keys.take(buckets, axis=0), axis=1)
            fits = used + index < _WIDTH
            chosen = left[fits]
            at[chosen] = _WIDTH * buckets[fits] + (used + index)[fits]
            self._keys.reshape(-1)[at[chosen]] = keys[chosen]
            left, buckets = left[~fits], (buckets[~fits] + 1) % self._buckets
        self._count += len(keys)
        return at

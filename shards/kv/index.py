"""Keys of one tier, and evictions when the tier is full: sans-I/O, on the leader.

The least recently used key is evicted. A prefix is useless without its beginning, so of a chain's
blocks, which are used together, the last is evicted first. Retained keys are evicted after all
others. Weighing by cost and frequency as well (GreedyDual-Size-Frequency) was tried and lost 1 to 4
points of hit rate on conversation traces.

Knows keys, slots and tenants; knows nothing of bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_Rank = tuple[bool, int, int, bytes]
"""Retained or not, last use, depth below zero, and key; the least is evicted first."""


@dataclass(slots=True)
class _Entry:
    slot: int
    tenant: str
    depth: int
    used: int = 0
    ready: bool = False
    discarded: bool = False
    num_users: int = 0


class TierIndex:
    """Keys of one tier.

    Args:
        capacity: most keys.
        max_tenant_share: largest share of the capacity for one tenant's keys, 0 to 1.
    """

    def __init__(self, capacity: int, max_tenant_share: float = 1.0) -> None:
        self.capacity = capacity
        self._most = max(1, int(capacity * max_tenant_share))
        self._entries: dict[bytes, _Entry] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._uses = 0  # counts `touch`
        self._heaps: dict[str, list[_Rank]] = {}
        self._retained: set[bytes] = set()
        self._num_of_tenant: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def tenants(self) -> dict[str, int]:
        """Entries of each tenant."""
        return {tenant: count for tenant, count in self._num_of_tenant.items() if count}

    def slot(self, key: bytes) -> int | None:
        """Slot of a key's bytes, once the bytes are there; None otherwise."""
        entry = self._entries.get(key)
        return entry.slot if entry is not None and entry.ready else None

    def reserve(self, key: bytes, tenant: str, depth: int) -> tuple[int, bytes | None] | None:
        """Reserve a slot for a new key: (slot, evicted key if any).

        The entry is in use until `commit` or `discard`. None when every entry is in use.
        """
        assert key not in self._entries, "reserved twice"
        victim = None
        if self._num_of_tenant.get(tenant, 0) >= self._most:
            victim = self._victim([tenant])
            if victim is None:
                return None
        elif not self._free:
            victim = self._victim(list(self._heaps))
            if victim is None:
                return None
        if victim is not None:
            self._remove(victim)
        if not self._free:
            return None
        entry = _Entry(self._free.pop(), tenant, depth, num_users=1)
        self._entries[key] = entry
        self._num_of_tenant[tenant] = self._num_of_tenant.get(tenant, 0) + 1
        return entry.slot, victim

    def commit(self, key: bytes) -> None:
        """Mark a reserved key as ready: its bytes are in the slot."""
        entry = self._entries[key]
        entry.ready = True
        entry.num_users -= 1
        entry.used = self._uses
        self._push(key, entry)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count a use of a chain of keys; missing keys are ignored."""
        self._uses += 1
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.ready:
                entry.used = self._uses
                self._push(key, entry)

    def retain(self, keys: Iterable[bytes]) -> None:
        """Evict these keys after all others, present keys and later ones."""
        for key in keys:
            self._retained.add(key)
            self._rank_again(key)

    def unretain(self, keys: Iterable[bytes]) -> None:
        """Undo `retain`."""
        for key in keys:
            self._retained.discard(key)
            self._rank_again(key)

    def lacks_retained(self, key: bytes) -> bool:
        """Whether a key is retained and not here."""
        return key in self._retained and key not in self._entries

    def missing_retained(self, chain: Sequence[bytes]) -> dict[bytes, int]:
        """Keys of a chain that are retained and not here, each with its index in the chain."""
        entries, retained = self._entries, self._retained
        return {
            key: depth for depth, key in enumerate(chain) if key in retained and key not in entries
        }

    def acquire(self, keys: Iterable[bytes]) -> None:
        """Protect keys from eviction, until as many calls of `release`."""
        for key in keys:
            self._entries[key].num_users += 1

    def release(self, keys: Iterable[bytes]) -> None:
        """Undo `acquire`, or a `reserve` whose transfer failed."""
        for key in keys:
            entry = self._entries[key]
            entry.num_users -= 1
            if entry.discarded and not entry.num_users:
                self._remove(key)
            elif entry.ready:
                self._push(key, entry)

    def is_unused(self, key: bytes) -> bool:
        """Whether a key is ready and not in use."""
        entry = self._entries[key]
        return entry.ready and not entry.num_users

    def discard(self, key: bytes) -> None:
        """Remove a key; its slot is free once no longer in use. Missing keys are ignored."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.num_users:  # a transfer uses the slot: do not free the slot yet
            entry.ready, entry.discarded = False, True
        else:
            self._remove(key)

    def _rank(self, key: bytes, entry: _Entry) -> _Rank:
        return key in self._retained, entry.used, -entry.depth, key

    def _rank_again(self, key: bytes) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.ready:
            self._push(key, entry)

    def _push(self, key: bytes, entry: _Entry) -> None:
        heap = self._heaps.setdefault(entry.tenant, [])
        heapq.heappush(heap, self._rank(key, entry))
        if len(heap) > 64 + 4 * self._num_of_tenant[entry.tenant]:
            self._rebuild(entry.tenant)

    def _rebuild(self, tenant: str) -> None:
        """Drop the stale items of a heap."""
        heap = [
            self._rank(key, entry)
            for key, entry in self._entries.items()
            if entry.tenant == tenant and entry.ready
        ]
        heapq.heapify(heap)
        self._heaps[tenant] = heap

    def _victim(self, tenants: list[str]) -> bytes | None:
        """The first key of these tenants to be evicted; None when every key is in use."""
        best: _Rank | None = None
        for tenant in tenants:
            heap = self._heaps.get(tenant, [])
            while heap:
                key = heap[0][-1]
                entry = self._entries.get(key)
                if (
                    entry is not None
                    and entry.tenant == tenant
                    and heap[0] == self._rank(key, entry)
                    and entry.ready
                    and not entry.num_users
                ):
                    if best is None or heap[0] < best:
                        best = heap[0]
                    break
                heapq.heappop(heap)  # stale, or in use: pushed again on release
        return None if best is None else best[-1]

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._free.append(entry.slot)
        self._num_of_tenant[entry.tenant] -= 1

"""What one tier holds, and who goes when it is full: sans-I/O, the leader's.

The least recently used goes. A prefix is worth nothing without its beginning, so of a chain's
blocks, which are used together, the end goes first. Weighing by cost and frequency as well
(GreedyDual-Size-Frequency) was tried and lost 1 to 4 points of hit rate on conversation traces.

Knows keys, slots and tenants; knows nothing of bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    slot: int
    tenant: str
    depth: int
    used: int = 0
    ready: bool = False
    doomed: bool = False
    holds: int = 0


class TierIndex:
    """Keys of one tier.

    Args:
        capacity: most keys.
        max_tenant_share: most of the capacity that one tenant's keys may take, 0 to 1.
    """

    def __init__(self, capacity: int, max_tenant_share: float = 1.0) -> None:
        self.capacity = capacity
        self._most = max(1, int(capacity * max_tenant_share))
        self._entries: dict[bytes, _Entry] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._uses = 0  # counts `touch`
        self._heaps: dict[str, list[tuple[int, int, bytes]]] = {}
        self._held_by: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def tenants(self) -> dict[str, int]:
        """Entries of each tenant."""
        return {tenant: count for tenant, count in self._held_by.items() if count}

    def slot(self, key: bytes) -> int | None:
        """Where a key's bytes are, once they are; None before and otherwise."""
        entry = self._entries.get(key)
        return entry.slot if entry is not None and entry.ready else None

    def reserve(self, key: bytes, tenant: str, depth: int) -> tuple[int, bytes | None] | None:
        """Take a slot for a key that is not here: (slot, the key that went for it if any).

        The entry is held until `commit` or `discard`. None when everything here is held.
        """
        assert key not in self._entries, "reserved twice"
        victim = None
        if self._held_by.get(tenant, 0) >= self._most:
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
        entry = _Entry(self._free.pop(), tenant, depth, holds=1)
        self._entries[key] = entry
        self._held_by[tenant] = self._held_by.get(tenant, 0) + 1
        return entry.slot, victim

    def commit(self, key: bytes) -> None:
        """The bytes of a reserved key are there."""
        entry = self._entries[key]
        entry.ready = True
        entry.holds -= 1
        entry.used = self._uses
        self._push(key, entry)

    def touch(self, keys: Sequence[bytes]) -> None:
        """A chain of keys was used; those that are not here are left out."""
        self._uses += 1
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.ready:
                entry.used = self._uses
                self._push(key, entry)

    def hold(self, keys: Iterable[bytes]) -> None:
        """Keep keys that are here, until as many calls of `release`."""
        for key in keys:
            self._entries[key].holds += 1

    def release(self, keys: Iterable[bytes]) -> None:
        """Undo `hold`, or a `reserve` that came to nothing."""
        for key in keys:
            entry = self._entries[key]
            entry.holds -= 1
            if entry.doomed and not entry.holds:
                self._remove(key)
            elif entry.ready:
                self._push(key, entry)

    def idle(self, key: bytes) -> bool:
        """Whether a key's bytes are here and nobody holds them."""
        entry = self._entries[key]
        return entry.ready and not entry.holds

    def discard(self, key: bytes) -> None:
        """Forget a key, and its slot once nobody holds it; safe when it is not here."""
        entry = self._entries.get(key)
        if entry is None:
            return
        if entry.holds:  # someone copies from the slot: it must not be given away
            entry.ready, entry.doomed = False, True
        else:
            self._remove(key)

    def _push(self, key: bytes, entry: _Entry) -> None:
        heap = self._heaps.setdefault(entry.tenant, [])
        heapq.heappush(heap, (entry.used, -entry.depth, key))
        if len(heap) > 64 + 4 * self._held_by[entry.tenant]:
            self._rebuild(entry.tenant)

    def _rebuild(self, tenant: str) -> None:
        """Leave the stale items of a heap behind."""
        heap = [
            (one.used, -one.depth, key)
            for key, one in self._entries.items()
            if one.tenant == tenant and one.ready
        ]
        heapq.heapify(heap)
        self._heaps[tenant] = heap

    def _victim(self, tenants: list[str]) -> bytes | None:
        """The key that was used least recently and that nobody holds, of these tenants."""
        best: tuple[int, int, bytes] | None = None
        for tenant in tenants:
            heap = self._heaps.get(tenant, [])
            while heap:
                used, _, key = heap[0]
                entry = self._entries.get(key)
                if (
                    entry is not None
                    and entry.tenant == tenant
                    and entry.used == used
                    and entry.ready
                    and not entry.holds
                ):
                    if best is None or heap[0] < best:
                        best = heap[0]
                    break
                heapq.heappop(heap)  # stale, or held: pushed again on release
        return None if best is None else best[2]

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._free.append(entry.slot)
        self._held_by[entry.tenant] -= 1

"""The gateways that listen, and the requests that wait in them.

Sans-I/O. Knows entries and times; knows nothing of groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from arriero.cluster.registry.snapshot import GatewayEntry

LEASE_S = 12.0
"""Seconds after its last report for which a gateway counts; a gateway reports every 4 s."""
_DEMAND_S = 5.0
"""Seconds for which a gateway's report of its queues is valid."""

Demand = dict[str, tuple[int, float]]
"""By model: number of waiting requests, and the longest predicted wait in seconds."""


class GatewayTable:
    """All gateways that listen.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: dict[str, GatewayEntry] = {}
        self._expiry_s: dict[str, float] = {}
        self._demand: dict[str, tuple[float, Demand]] = {}

    def current(self) -> tuple[GatewayEntry, ...]:
        """The entries of all gateways whose lease is valid; removes the others."""
        now_s = self._clock()
        for gateway_id in [known for known, at_s in self._expiry_s.items() if at_s <= now_s]:
            self.remove(gateway_id)
        return tuple(self._entries.values())

    def renew(self, entry: GatewayEntry) -> None:
        """Add a gateway or renew its lease; replaces an older gateway at the same address."""
        for old_id in [old.id for old in self._entries.values() if old.address == entry.address]:
            del self._entries[old_id]
        self._entries[entry.id] = entry
        self._expiry_s[entry.id] = self._clock() + LEASE_S

    def remove(self, gateway_id: str) -> None:
        """Remove a gateway; does nothing when the gateway is unknown."""
        self._entries.pop(gateway_id, None)
        self._expiry_s.pop(gateway_id, None)

    def report_demand(self, gateway_id: str, waiting: Demand) -> None:
        """Record the waiting requests of a gateway."""
        self._demand[gateway_id] = self._clock(), waiting

    def demand(self) -> Demand:
        """Waiting requests of all gateways with a valid report, by model."""
        total: Demand = {}
        now_s = self._clock()
        for gateway_id, (at_s, waiting) in list(self._demand.items()):
            if now_s - at_s > _DEMAND_S:
                del self._demand[gateway_id]
                continue
            for model, (count, wait_s) in waiting.items():
                before = total.get(model, (0, 0.0))
                total[model] = (before[0] + count, max(before[1], wait_s))
        return total

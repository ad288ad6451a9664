"""Detects lost groups whose leader cannot report the loss itself.

Three signs: a lease that ends, a node whose raylet is gone, and a gateway's report of a broken
link, which is checked. Knows leases, leaders' addresses and nodes; knows nothing of the treatment
of a loss.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from arriero.cluster.hosts import nodes
from arriero.cluster.registry.background_tasks import BackgroundTasks
from arriero.cluster.registry.group_table import GroupTable
from arriero.cluster.registry.history import Failure
from arriero.cluster.registry.snapshot import GroupEntry
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind

SUSPECT_S = 2.5
"""Seconds without a renewal after which a suspected leader counts as hung."""
_PROBE_S = 1.0
_SUSPECT_PERIOD_S = 0.2
"""Seconds between two checks of a suspected group."""
_LEASE_CHECK_S = 0.5
"""Largest number of seconds between two checks of the leases."""


class LossDetector:
    """Watches the groups of a table; for use in one event loop.

    Args:
        groups: the table.
        fail: records a failure, and removes the group from the table.
        tasks: run the watches.
    """

    def __init__(
        self,
        groups: GroupTable,
        fail: Callable[[Failure], Awaitable[None]],
        tasks: BackgroundTasks,
    ) -> None:
        self._groups, self._fail, self._tasks = groups, fail, tasks
        self._watched_nodes: set[str] = set()
        self._checks_leases = False

    def watch(self, entry: GroupEntry) -> None:
        """Watch the lease and the node of a group.

        A lost node may take the leader and every gateway with it, so that nobody else could report
        the loss.
        """
        if not self._checks_leases:
            self._checks_leases = True
            self._tasks.start(self._check_leases())
        if entry.node_id and entry.node_id not in self._watched_nodes:
            self._watched_nodes.add(entry.node_id)
            self._tasks.start(self._watch_node(entry.node_id))

    def check_leases(self) -> None:
        """Start the treatment of all groups whose lease has ended."""
        for entry in self._groups.take_expired():
            silent_s = self._groups.silent_s(entry.group_id)
            words = f"its leader has not been heard for {silent_s:.1f} s"
            self._tasks.start(self._lost(entry, Kind.SILENT, words, "", after_s=silent_s))

    async def suspect(self, group_id: str, cause: str) -> None:
        """Check the leader of a group whose link a gateway has lost.

        The check repeats for some seconds: a process that ends may close its links first and its
        port later.
        """
        until_s = time.monotonic() + SUSPECT_S
        while time.monotonic() < until_s:
            entry = self._groups.get(group_id)
            if entry is None or entry.phase != "serving":
                return
            if not await nodes.answers(entry.address, _PROBE_S):
                await self._lost(entry, Kind.CRASH, "its leader is gone", cause)
                return
            if (silent_s := self._groups.silent_s(group_id)) > SUSPECT_S:
                words = f"its leader has been silent for {silent_s:.1f} s: stopped, or cut off"
                await self._lost(entry, Kind.SILENT, words, cause, after_s=silent_s)
                return
            await asyncio.sleep(_SUSPECT_PERIOD_S)

    async def _check_leases(self) -> None:
        while self._groups.entries:
            next_s = self._groups.next_expiry_s()
            await asyncio.sleep(max(0.01, min(_LEASE_CHECK_S, next_s)))
            self.check_leases()
        self._checks_leases = False

    async def _watch_node(self, node_id: str) -> None:
        try:
            await nodes.until_gone(node_id)
        finally:
            self._watched_nodes.discard(node_id)  # the next renewal starts a new watch
        for entry in [group for group in self._groups.entries if group.node_id == node_id]:
            await self._lost(entry, Kind.CRASH, "its leader is gone", "")

    async def _lost(
        self, entry: GroupEntry, kind: Kind, words: str, report: str, after_s: float = 0.0
    ) -> None:
        """Record the loss of a group; does nothing when the loss is recorded already."""
        if self._groups.get(entry.group_id) is None:
            return
        if kind is Kind.CRASH and await asyncio.to_thread(nodes.is_gone, entry.node_id):
            words = f"node {entry.node} is gone: its raylet does not answer"
        text = f"{words} (pid {entry.pid} on {entry.node})"
        cause = Evidence(
            kind=kind, summary=text, node=entry.node, pid=entry.pid, phase="leader", after_s=after_s
        )
        record = FirstCause(cause=cause, folded=(f"a gateway: {report}",) if report else ())
        await self._fail(
            Failure(
                who=entry.group_id,
                kind="GroupFailed",
                cause=text,
                seat=entry.seat,
                record=record.to_wire(),
            )
        )

"""The registry: a small named actor that lists the groups and gateways that serve now.

Leaders renew their entries once per health period, so a registry that Ray restarts is complete
again after that period; epochs and history are in Ray's own key-value store. A group that is
silent, or that has lost its leader, is *fenced*: the registry refuses the id of the group, gateways
close their links, and the processes of the group are killed. Knows addresses, leases and events;
knows nothing of models, requests or placement.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import ray
from ray.actor import ActorHandle

from arriero.cluster.hosts import kv_store as store
from arriero.cluster.hosts import nodes
from arriero.cluster.registry.background_tasks import BackgroundTasks
from arriero.cluster.registry.gateway_table import Demand, GatewayTable
from arriero.cluster.registry.group_table import GroupTable
from arriero.cluster.registry.history import Event, Failure, History, StoredHistory
from arriero.cluster.registry.loss_detector import LossDetector
from arriero.cluster.registry.snapshot import GatewayEntry, GroupEntry, RegistrySnapshot
from arriero.cluster.registry.spare_seats import SpareSeats
from arriero.cluster.registry.token_ledger import TokenLedger
from arriero.cluster.spec.live_settings import LiveSettings

NAME = "registry"
NAMESPACE = "arriero"
STORED = ("epochs", "fenced", "history", "ledger", "live", "spares", "weights")
"""Names of the values that the registry keeps in Ray's key-value store."""
_POLL_S = 4.0
_STAND_IN_S = 30.0
"""Largest delay in seconds of a spare group's start in favour of promoted groups."""
_STAND_IN_CHECK_S = 0.5


class Registry:
    """The actor behind `connect()`; each method but `changed` and `wait_for_promotion` is fast."""

    def __init__(self) -> None:
        self._version = time.time_ns()  # larger than each version before a restart
        self._changed = asyncio.Event()
        self._groups = GroupTable(
            store.get("epochs", dict[str, int]) or {}, store.get("fenced", list[str]) or []
        )
        self._gateways = GatewayTable()
        self._spares = SpareSeats(store.get("spares", dict[str, tuple[str, int]]) or {})
        self._history = History(store.get("history", StoredHistory))
        self._progress: dict[str, str] = {}
        self._starting: dict[str, GroupEntry] = {}  # by seat
        self._live = store.get("live", LiveSettings)
        self._tasks = BackgroundTasks()
        self._losses = LossDetector(self._groups, self.fail, self._tasks)
        self._wanted: dict[str, int] = {}
        self._ledger = store.get("ledger", TokenLedger) or TokenLedger()

    async def next_epoch(self, seat: str) -> int:
        """A new epoch for a seat.

        A spare group waits until all promoted groups serve, since their start needs the cores.
        """
        deadline_s = time.monotonic() + _STAND_IN_S
        while self._spares.must_wait(seat) and time.monotonic() < deadline_s:
            await asyncio.sleep(_STAND_IN_CHECK_S)
        epoch = self._groups.next_epoch(seat)
        store.put("epochs", self._groups.epochs)
        return epoch

    async def spare(self, seat: str, model: str, revision: int) -> None:
        """Make a seat a spare: its group waits on standby until a group of the model is lost."""
        self._spares.add(seat, model, revision)
        store.put("spares", self._spares.seats)

    async def promote(self, seat: str) -> None:
        """Let the group of a seat serve; does nothing when the seat is no spare."""
        if self._spares.promote(seat):
            store.put("spares", self._spares.seats)
            self._changed.set()

    async def wait_for_promotion(self, seat: str, limit_s: float) -> bool:
        """Whether the group of a seat may serve; waits up to `limit_s` seconds for a promotion."""
        deadline_s = time.monotonic() + limit_s
        while seat in self._spares:
            self._spares.poll(seat)
            if (left_s := deadline_s - time.monotonic()) <= 0:
                return False
            await self._wait_for_change(left_s)
        return True

    async def reload(self, live: LiveSettings) -> None:
        """Publish new live settings to all gateways and leaders, later ones included."""
        store.put("live", live)
        self._live = live
        self._publish()

    async def want(self, counts: dict[str, int]) -> None:
        """Record the desired number of groups of each model, for the metrics of gateways."""
        self._wanted = counts

    async def live(self) -> LiveSettings | None:
        """The settings that `reload` changed since the deployment, or None."""
        return self._live

    async def register(self, entry: GroupEntry, lease_s: float) -> int | None:
        """Add or renew a group; the lease ends `lease_s` seconds after the last renewal.

        A group that serves replaces an older group of the same seat; the older group is fenced
        unless it drains.

        Returns:
            The version of the live settings; None when the group is fenced and must end.
        """
        if self._groups.refuses(entry):
            return None
        known = self._groups.get(entry.group_id)
        for older in self._groups.older(entry):
            self._fence(older)
        self._groups.renew(entry, lease_s)
        self._losses.watch(entry)
        self._started(entry.group_id)
        if known is None:
            self._history.serving(time.time(), self._spares.serves(entry.seat), entry.group_id)
            self._store_history()
        if known is None or (known.address, known.phase) != (entry.address, entry.phase):
            if entry.phase == "draining":
                await self.note("draining", entry.group_id, "takes no more requests")
            self._publish()
        return 0 if self._live is None else self._live.version

    async def unregister(self, group_id: str) -> None:
        """Remove a group that has ended as planned; does nothing when the group is unknown."""
        self._started(group_id)
        if self._groups.remove(group_id) is not None:
            await self.note("gone", group_id, "ended")
            self._publish()

    async def report(self, group_id: str, text: str) -> None:
        """Record the progress of a group's start."""
        self._progress[group_id] = text

    async def starting(self, entry: GroupEntry) -> None:
        """Record the processes of a group that starts; its address is still unknown."""
        self._starting[entry.seat] = entry

    async def fail(self, failure: Failure) -> None:
        """Record the failure of a group or gateway and remove it; the first report counts."""
        failure = replace(failure, at=failure.at or time.time())
        self._history.failed(failure)
        self._store_history()
        self._gateways.remove(failure.who)
        self._started(failure.who)
        self._spares.failed(failure.seat)
        if (entry := self._groups.get(failure.who)) is not None:
            if entry.phase == "serving":
                await self._replace(entry)
            self._fence(entry)

    async def suspect(self, group_id: str, cause: str) -> None:
        """Check the leader of a group whose link a gateway has lost."""
        await self._losses.suspect(group_id, cause)

    async def gateway(self, entry: GatewayEntry) -> None:
        """Add or renew a gateway: once per period, and when its links change."""
        self._gateways.renew(entry)

    async def gateway_gone(self, gateway_id: str) -> None:
        """Remove a gateway that no longer listens; does nothing when the gateway is unknown."""
        self._gateways.remove(gateway_id)

    async def demand(self, gateway_id: str, waiting: Demand) -> None:
        """Record the waiting requests of a gateway by model; comes every second while any wait."""
        self._gateways.report_demand(gateway_id, waiting)

    async def spend(self, day: int, spent: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """Add the tokens that a gateway charged to tenants with a budget; returns all sums."""
        total = self._ledger.add(day, spent)
        if spent:
            with contextlib.suppress(RuntimeError):  # Ray's store restarts; the next sums are kept
                store.put("ledger", self._ledger)
        return total

    async def note(self, kind: str, who: str, text: str, by: str = "") -> None:
        """Record an event; `by` is the admin token that asked for it."""
        self._history.note(time.time(), kind, who, text, by)
        self._store_history()

    async def events(self) -> tuple[Event, ...]:
        """The latest events, oldest first."""
        return self._history.events

    async def why(self, name: str) -> Failure | None:
        """The latest failure of a group, seat or model; with "" the latest of all."""
        return self._history.why(name)

    async def changed(self, version: int) -> RegistrySnapshot:
        """The snapshot once its version differs from `version`, at the latest after 4 seconds."""
        deadline_s = time.monotonic() + _POLL_S
        while self._version == version and (left_s := deadline_s - time.monotonic()) > 0:
            await self._wait_for_change(left_s)
        return await self.snapshot()

    async def snapshot(self) -> RegistrySnapshot:
        """The snapshot of this moment."""
        self._losses.check_leases()
        return RegistrySnapshot(
            version=self._version,
            groups=self._groups.entries,
            gateways=self._gateways.current(),
            progress=dict(self._progress),
            starting=tuple(self._starting.values()),
            failures=self._history.failures,
            fenced=tuple(self._groups.fenced),
            demand=self._gateways.demand(),
            live=self._live,
            spares=tuple(self._spares.seats),
            standby=self._spares.standby(),
            wanted=self._wanted,
            epochs=dict(self._groups.epochs),
        )

    def _started(self, group_id: str) -> None:
        """The start of a group has ended, well or not."""
        self._progress.pop(group_id, None)
        for seat in [seat for seat, entry in self._starting.items() if entry.group_id == group_id]:
            del self._starting[seat]

    async def _replace(self, lost: GroupEntry) -> None:
        """Promote a spare group in place of a lost group."""
        seat = self._spares.take_over(lost)
        if seat is not None:
            await self.promote(seat)
            await self.note("spare", seat, f"takes the place of {lost.seat}")

    def _fence(self, entry: GroupEntry) -> None:
        """Refuse a group from now on, and kill its processes."""
        self._groups.fence(entry.group_id)
        store.put("fenced", self._groups.fenced)
        self._publish()
        processes = [(entry.node_id, entry.pid)]
        processes += zip(entry.slice_node_ids, entry.slice_pids, strict=True)
        self._tasks.start(nodes.kill_all(processes))

    def _store_history(self) -> None:
        # Ray's store is unreachable while its head restarts
        with contextlib.suppress(RuntimeError):
            store.put("history", self._history.stored)

    async def _wait_for_change(self, limit_s: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), limit_s)

    def _publish(self) -> None:
        self._version += 1
        self._changed.set()


def connect() -> ActorHandle[Registry]:
    """The registry of the cluster; creates the actor if there is none."""
    handle: ActorHandle[Registry] = (
        ray.remote(Registry)
        .options(  # type: ignore[assignment]
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            enable_task_events=False,  # several calls a second, which Ray's head would record
            resources=nodes.ON_HEAD,
            max_restarts=-1,
            max_task_retries=3,
            max_concurrency=1000,
        )
        .remote()
    )
    return handle

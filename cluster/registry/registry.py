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
import math
import time
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorHandle

from arriero.cluster.hosts import kv_store as store
from arriero.cluster.hosts import nodes
from arriero.cluster.registry.history import Event, Failure, History
from arriero.cluster.registry.snapshot import GatewayEntry, GroupEntry, RegistrySnapshot
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind

NAME = "registry"
NAMESPACE = "arriero"
_POLL_S = 4.0
PROMOTION_POLL_S = 2.0
"""Seconds between two questions of a spare group whether it is promoted."""
_GATEWAY_LEASE_S = 3 * _POLL_S
_KEEP_FENCED = 64
_SUSPECT_S = 2.5
"""Seconds without a renewal after which a suspected leader counts as hung."""
_PROBE_S = 1.0
_SUSPECT_PERIOD_S = 0.2
"""Seconds between two checks of a suspected group."""
_LEASE_CHECK_S = 0.5
"""Largest number of seconds between two checks of the leases."""
_STAND_IN_S = 30.0
"""Largest delay in seconds of a spare group's start in favour of promoted groups."""
_DEMAND_S = 5.0
"""Seconds for which a gateway's report of its queues is valid."""


class Registry:
    """The actor behind `connect()`; each method but `changed` and `wait_for_promotion` is fast."""

    def __init__(self) -> None:
        self._version = time.time_ns()  # larger than each version before a restart
        self._groups: dict[str, GroupEntry] = {}
        self._expiry_s: dict[str, float] = {}
        self._renewed_s: dict[str, float] = {}
        self._gateways: dict[str, GatewayEntry] = {}
        self._gateway_expiry_s: dict[str, float] = {}
        self._demand: dict[str, tuple[float, dict[str, tuple[int, float]]]] = {}
        self._progress: dict[str, str] = {}
        self._epochs: dict[str, int] = store.get("epochs") or {}
        self._fenced: list[str] = store.get("fenced") or []
        self._history = History(store.get("history"))
        live = store.get("live")
        self._live = None if live is None else LiveSettings.from_wire(live)
        # Spare seats with model and revision, and the time of the last question for promotion.
        self._spares: dict[str, list[Any]] = store.get("spares") or {}
        self._polled_s: dict[str, float] = {}
        self._stands_in: dict[str, str] = {}  # promoted seat: lost seat, until it serves
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: set[str] = set()
        self._checks_leases = False

    async def next_epoch(self, seat: str) -> int:
        """A new epoch for a seat.

        A spare group waits until all promoted groups serve, since their start needs the cores.
        """
        deadline_s = time.monotonic() + _STAND_IN_S
        while seat in self._spares and self._stands_in and time.monotonic() < deadline_s:
            await asyncio.sleep(_LEASE_CHECK_S)
        epoch = self._epochs[seat] = self._epochs.get(seat, 0) + 1
        store.put("epochs", self._epochs)
        return epoch

    async def spare(self, seat: str, model: str, revision: int) -> None:
        """Make a seat a spare: its group waits on standby until a group of the model is lost."""
        self._spares[seat] = [model, revision]
        store.put("spares", self._spares)

    async def promote(self, seat: str) -> None:
        """Let the group of a seat serve; does nothing when the seat is no spare."""
        self._polled_s.pop(seat, None)
        if self._spares.pop(seat, None) is not None:
            store.put("spares", self._spares)
            self._changed.set()

    async def wait_for_promotion(self, seat: str, limit_s: float) -> bool:
        """Whether the group of a seat may serve; waits up to `limit_s` seconds for a promotion."""
        deadline_s = time.monotonic() + limit_s
        while seat in self._spares:
            self._polled_s[seat] = time.monotonic()
            if (left_s := deadline_s - time.monotonic()) <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)
        return True

    async def reload(self, live: LiveSettings) -> None:
        """Publish new live settings to all gateways and leaders, later ones included."""
        store.put("live", live.to_wire())
        self._live = live
        self._publish()

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
        if entry.group_id in self._fenced:
            return None
        known = self._groups.get(entry.group_id)
        serving = [
            group
            for group in self._groups.values()
            if group.seat == entry.seat and group.phase == "serving"
        ]
        if entry.phase == "serving" and any(group.epoch > entry.epoch for group in serving):
            return None
        for older in [group for group in serving if group.epoch < entry.epoch]:
            self._fence(older)
        self._groups[entry.group_id] = entry
        now_s = time.monotonic()
        self._expiry_s[entry.group_id] = now_s + lease_s
        self._renewed_s[entry.group_id] = now_s
        self._watch(entry)
        self._progress.pop(entry.group_id, None)
        self._epochs[entry.seat] = max(entry.epoch, self._epochs.get(entry.seat, 0))
        if known is None:
            lost = self._stands_in.pop(entry.seat, entry.seat)
            self._history.serving(time.time(), lost, entry.group_id)
            self._store_history()
        if known is None or (known.address, known.phase) != (entry.address, entry.phase):
            if entry.phase == "draining":
                await self.note("draining", entry.group_id, "takes no more requests")
            self._publish()
        return 0 if self._live is None else self._live.version

    async def unregister(self, group_id: str) -> None:
        """Remove a group that has ended as planned; does nothing when the group is unknown."""
        self._progress.pop(group_id, None)
        if self._forget(group_id) is not None:
            await self.note("gone", group_id, "ended")
            self._publish()

    async def report(self, group_id: str, text: str) -> None:
        """Record the progress of a group's start."""
        self._progress[group_id] = text

    async def fail(self, failure: Failure) -> None:
        """Record the failure of a group or gateway and remove it; the first report counts."""
        failure = replace(failure, at=failure.at or time.time())
        self._history.failed(failure)
        self._store_history()
        self._gateways.pop(failure.who, None)
        self._progress.pop(failure.who, None)
        self._stands_in.pop(failure.seat, None)
        if (entry := self._groups.get(failure.who)) is not None:
            if entry.phase == "serving":
                await self._replace(entry)
            self._fence(entry)

    async def suspect(self, group_id: str, cause: str) -> None:
        """Check the leader of a group whose link a gateway has lost.

        The check repeats for some seconds: a process that ends may close its links first and its
        port later.
        """
        until_s = time.monotonic() + _SUSPECT_S
        while time.monotonic() < until_s:
            entry = self._groups.get(group_id)
            if entry is None or entry.phase != "serving":
                return
            if not await nodes.answers(entry.address, _PROBE_S):
                await self._lost(entry, Kind.CRASH, "its leader is gone", cause)
                return
            if (silent_s := time.monotonic() - self._renewed_s[group_id]) > _SUSPECT_S:
                words = f"its leader has been silent for {silent_s:.1f} s: stopped, or cut off"
                await self._lost(entry, Kind.SILENT, words, cause, after_s=silent_s)
                return
            await asyncio.sleep(_SUSPECT_PERIOD_S)

    async def gateway(self, entry: GatewayEntry) -> None:
        """Add or renew a gateway: once per period, and when its links change."""
        for old_id in [old.id for old in self._gateways.values() if old.address == entry.address]:
            del self._gateways[old_id]  # the gateway before, at the same address
        self._gateways[entry.id] = entry
        self._gateway_expiry_s[entry.id] = time.monotonic() + _GATEWAY_LEASE_S

    async def gateway_gone(self, gateway_id: str) -> None:
        """Remove a gateway that no longer listens; does nothing when the gateway is unknown."""
        self._gateways.pop(gateway_id, None)

    async def demand(self, gateway_id: str, waiting: dict[str, tuple[int, float]]) -> None:
        """Record the waiting requests of a gateway by model; comes every second while any wait."""
        self._demand[gateway_id] = time.monotonic(), waiting

    async def note(self, kind: str, who: str, text: str) -> None:
        """Record an event."""
        self._history.note(time.time(), kind, who, text)
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
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left_s)
        return await self.snapshot()

    async def snapshot(self) -> RegistrySnapshot:
        """The snapshot of this moment."""
        self._expire()
        return RegistrySnapshot(
            version=self._version,
            groups=tuple(self._groups.values()),
            gateways=tuple(self._gateways.values()),
            progress=dict(self._progress),
            failures=self._history.failures,
            fenced=tuple(self._fenced),
            demand=self._waiting(),
            live=self._live,
            spares=tuple(self._spares),
            standby=tuple(seat for seat in self._spares if self._stands_by(seat)),
        )

    def _waiting(self) -> dict[str, tuple[int, float]]:
        """Waiting requests of all gateways with a valid report, by model."""
        total: dict[str, tuple[int, float]] = {}
        now_s = time.monotonic()
        for gateway_id, (at_s, waiting) in list(self._demand.items()):
            if now_s - at_s > _DEMAND_S:
                del self._demand[gateway_id]
                continue
            for model, (count, wait_s) in waiting.items():
                before = total.get(model, (0, 0.0))
                total[model] = (before[0] + count, max(before[1], wait_s))
        return total

    def _watch(self, entry: GroupEntry) -> None:
        """Watch the lease and the node of a group.

        A lost node may take the leader and every gateway with it, so that nobody else could report
        the loss.
        """
        if not self._checks_leases:
            self._checks_leases = True
            self._in_background(self._check_leases())
        if entry.node_id and entry.node_id not in self._watched:
            self._watched.add(entry.node_id)
            self._in_background(self._watch_node(entry.node_id))

    async def _check_leases(self) -> None:
        while self._groups:
            nearest_s = min(self._expiry_s.values(), default=math.inf) - time.monotonic()
            await asyncio.sleep(max(0.01, min(_LEASE_CHECK_S, nearest_s)))
            self._expire()
        self._checks_leases = False

    async def _watch_node(self, node_id: str) -> None:
        try:
            await nodes.until_gone(node_id)
        finally:
            self._watched.discard(node_id)  # the next renewal starts a new watch
        for entry in [group for group in self._groups.values() if group.node_id == node_id]:
            await self._lost(entry, Kind.CRASH, "its leader is gone", "")

    async def _lost(
        self, entry: GroupEntry, kind: Kind, words: str, report: str, after_s: float = 0.0
    ) -> None:
        """Record the loss of a group whose leader cannot report the loss, and fence the group."""
        if entry.group_id not in self._groups:
            return  # reported already
        if kind is Kind.CRASH and await asyncio.to_thread(nodes.is_gone, entry.node_id):
            words = f"node {entry.node} is gone: its raylet does not answer"
        text = f"{words} (pid {entry.pid} on {entry.node})"
        cause = Evidence(
            kind=kind, summary=text, node=entry.node, pid=entry.pid, phase="leader", after_s=after_s
        )
        record = FirstCause(cause=cause, folded=(f"a gateway: {report}",) if report else ())
        await self.fail(
            Failure(
                who=entry.group_id,
                kind="GroupFailed",
                cause=text,
                seat=entry.seat,
                record=record.to_wire(),
            )
        )

    def _stands_by(self, seat: str) -> bool:
        return time.monotonic() - self._polled_s.get(seat, -math.inf) < 2 * PROMOTION_POLL_S

    async def _replace(self, lost: GroupEntry) -> None:
        """Promote a spare group in place of a lost group; the lost seat becomes a spare."""
        wanted = [lost.model, lost.revision]
        ready = [
            seat
            for seat, settings in self._spares.items()
            if settings == wanted and self._stands_by(seat)
        ]
        if not ready:
            return
        self._spares[lost.seat] = wanted
        self._stands_in[ready[0]] = lost.seat
        await self.promote(ready[0])
        await self.note("spare", ready[0], f"takes the place of {lost.seat}")

    def _fence(self, entry: GroupEntry) -> None:
        """Refuse a group from now on, and kill its processes."""
        self._forget(entry.group_id)
        self._fenced = [*self._fenced, entry.group_id][-_KEEP_FENCED:]
        store.put("fenced", self._fenced)
        self._publish()
        places = [(entry.node_id, entry.pid)]
        places += zip(entry.slice_node_ids, entry.slice_pids, strict=True)
        self._in_background(nodes.kill_all(places))

    def _in_background(self, work: Any) -> None:  # noqa: ANN401
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget(self, group_id: str) -> GroupEntry | None:
        self._expiry_s.pop(group_id, None)
        self._renewed_s.pop(group_id, None)
        return self._groups.pop(group_id, None)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for group_id in [known for known, at_s in self._expiry_s.items() if at_s <= now_s]:
            silent_s = now_s - self._renewed_s[group_id]
            del self._expiry_s[group_id]
            words = f"its leader has not been heard for {silent_s:.1f} s"
            entry = self._groups[group_id]
            self._in_background(self._lost(entry, Kind.SILENT, words, "", after_s=silent_s))
        for gateway_id in [
            known for known, at_s in self._gateway_expiry_s.items() if at_s <= now_s
        ]:
            del self._gateway_expiry_s[gateway_id]
            self._gateways.pop(gateway_id, None)

    def _store_history(self) -> None:
        with contextlib.suppress(
            RuntimeError
        ):  # Ray's store is unreachable while its head restarts
            store.put("history", self._history.to_wire())

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

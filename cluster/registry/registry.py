"""Which groups serve now, for the gateways to follow: one small named actor.

Leaders renew their entries every health period, so a registry that Ray restarts fills again within
one; epochs and history it keeps in Ray's own store. A group that is silent, or whose leader is
gone, is *fenced*: its id is refused from then on, gateways no longer hear it, and its processes are
killed. Knows addresses, leases and events; knows nothing of models, requests or placement.
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
"""So often a group that stands by asks whether it is its turn, if it is not told sooner."""
_GATEWAY_LEASE_S = 3 * _POLL_S
_KEEP_FENCED = 64
_SUSPECT_S = 2.5
"""A suspected group that has not renewed for so long is taken to hang."""
_PROBE_S = 1.0
_AGAIN_S = 0.2
"""Between two looks at a suspected group."""
_LEASES_S = 0.5
"""At most between two looks at the leases."""
_STAND_IN_S = 30.0
"""The longest that a spare's start is put off for those that stand in for lost groups."""
_DEMAND_S = 5.0
"""What a gateway told of its queues is true for so long."""


class Registry:
    """The actor behind `connect()`; every method answers at once but `changed`."""

    def __init__(self) -> None:
        self._version = time.time_ns()  # no number of an earlier life comes again
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
        # seats of spare groups, each with its model and revision; and when each last asked its turn
        self._spares: dict[str, list[Any]] = store.get("spares") or {}
        self._asked_s: dict[str, float] = {}
        self._stands_in: dict[str, str] = {}  # promoted seats, and for whom, until they serve
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watched: set[str] = set()
        self._counting = False

    async def next_epoch(self, seat: str) -> int:
        """A new epoch for a seat.

        A spare's comes once the groups that stand in for lost ones serve: they need the cores.
        """
        deadline_s = time.monotonic() + _STAND_IN_S
        while seat in self._spares and self._stands_in and time.monotonic() < deadline_s:
            await asyncio.sleep(_LEASES_S)
        epoch = self._epochs[seat] = self._epochs.get(seat, 0) + 1
        store.put("epochs", self._epochs)
        return epoch

    async def spare(self, seat: str, model: str, revision: int) -> None:
        """Have the group that starts in a seat stand by, for one of its model that is lost."""
        self._spares[seat] = [model, revision]
        store.put("spares", self._spares)

    async def promote(self, seat: str) -> None:
        """Have a seat's group serve; safe for one that is no spare."""
        self._asked_s.pop(seat, None)
        if self._spares.pop(seat, None) is not None:
            store.put("spares", self._spares)
            self._moved.set()

    async def wait_for_promotion(self, seat: str, limit_s: float) -> bool:
        """Whether a group that has started is to serve: at once, or within `limit_s` seconds."""
        deadline_s = time.monotonic() + limit_s
        while seat in self._spares:
            self._asked_s[seat] = time.monotonic()
            if (left_s := deadline_s - time.monotonic()) <= 0:
                return False
            self._moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left_s)
        return True

    async def reload(self, live: LiveSettings) -> None:
        """Have gateways and leaders take other settings, those that start later too."""
        store.put("live", live.to_wire())
        self._live = live
        self._bump()

    async def live(self) -> LiveSettings | None:
        """The settings that were changed since the deployment, or None."""
        return self._live

    async def register(self, entry: GroupEntry, lease_s: float) -> int | None:
        """Add or renew a group; it is dropped when not renewed within `lease_s` seconds.

        A group that serves takes the place of an older one in its seat, which is fenced unless it
        drains.

        Returns:
            None when it is fenced: it must end; else the version of the live settings.
        """
        if entry.group_id in self._fenced:
            return None
        known = self._groups.get(entry.group_id)
        serving = [
            one
            for one in self._groups.values()
            if one.seat == entry.seat and one.phase == "serving"
        ]
        if entry.phase == "serving" and any(one.epoch > entry.epoch for one in serving):
            return None
        for older in [one for one in serving if one.epoch < entry.epoch]:
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
            self._keep()
        if known is None or (known.address, known.phase) != (entry.address, entry.phase):
            if entry.phase == "draining":
                await self.note("draining", entry.group_id, "takes no more requests")
            self._bump()
        return 0 if self._live is None else self._live.version

    async def unregister(self, group_id: str) -> None:
        """A group has ended well; safe when it is not there."""
        self._progress.pop(group_id, None)
        if self._forget(group_id) is not None:
            await self.note("gone", group_id, "ended")
            self._bump()

    async def report(self, group_id: str, text: str) -> None:
        """Say how far a group's start is."""
        self._progress[group_id] = text

    async def fail(self, failure: Failure) -> None:
        """Say why a group or a gateway failed, and forget it; the first word of it counts."""
        failure = replace(failure, at=failure.at or time.time())
        self._history.failed(failure)
        self._keep()
        self._gateways.pop(failure.who, None)
        self._progress.pop(failure.who, None)
        self._stands_in.pop(failure.seat, None)
        if (entry := self._groups.get(failure.who)) is not None:
            if entry.phase == "serving":
                await self._replace(entry)
            self._fence(entry)

    async def suspect(self, group_id: str, cause: str) -> None:
        """A gateway has lost its link to a group: see whether its leader is there.

        It is asked again for a while: a process that ends may listen longer than its links last.
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
            await asyncio.sleep(_AGAIN_S)

    async def gateway(self, entry: GatewayEntry) -> None:
        """Say where a gateway listens: now and then, and when its links change."""
        for other in [one.id for one in self._gateways.values() if one.address == entry.address]:
            del self._gateways[other]  # it listened there before it was replaced
        self._gateways[entry.id] = entry
        self._gateway_expiry_s[entry.id] = time.monotonic() + _GATEWAY_LEASE_S

    async def gateway_gone(self, gateway_id: str) -> None:
        """A gateway no longer listens; safe when it is not there."""
        self._gateways.pop(gateway_id, None)

    async def demand(self, gateway_id: str, waiting: dict[str, tuple[int, float]]) -> None:
        """Say what waits in a gateway, by model, every second while anything does."""
        self._demand[gateway_id] = time.monotonic(), waiting

    async def note(self, kind: str, who: str, text: str) -> None:
        """Keep an event."""
        self._history.note(time.time(), kind, who, text)
        self._keep()

    async def events(self) -> tuple[Event, ...]:
        """The latest events, oldest first."""
        return self._history.events

    async def why(self, name: str) -> Failure | None:
        """The latest failure of a group, seat or model; "" for the latest of all."""
        return self._history.why(name)

    async def changed(self, version: int) -> RegistrySnapshot:
        """The board as soon as its version is not `version`, or after some seconds as it is."""
        deadline_s = time.monotonic() + _POLL_S
        while self._version == version and (left_s := deadline_s - time.monotonic()) > 0:
            self._moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left_s)
        return await self.snapshot()

    async def snapshot(self) -> RegistrySnapshot:
        """The board now."""
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
            standby=tuple(one for one in self._spares if self._stands_by(one)),
        )

    def _waiting(self) -> dict[str, tuple[int, float]]:
        """What waits in all gateways that told of it lately."""
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
        """See to it that the end of a group is found by this actor alone.

        A node that is lost may take the leader and every gateway that could tell of it along.
        """
        if not self._counting:
            self._counting = True
            self._in_background(self._count_leases())
        if entry.node_id and entry.node_id not in self._watched:
            self._watched.add(entry.node_id)
            self._in_background(self._watch_node(entry.node_id))

    async def _count_leases(self) -> None:
        while self._groups:
            nearest_s = min(self._expiry_s.values(), default=math.inf) - time.monotonic()
            await asyncio.sleep(max(0.01, min(_LEASES_S, nearest_s)))
            self._expire()
        self._counting = False

    async def _watch_node(self, node_id: str) -> None:
        try:
            await nodes.until_gone(node_id)
        finally:
            self._watched.discard(node_id)  # the next renewal begins another watch
        for entry in [one for one in self._groups.values() if one.node_id == node_id]:
            await self._lost(entry, Kind.CRASH, "its leader is gone", "")

    async def _lost(
        self, entry: GroupEntry, kind: Kind, words: str, seen: str, after_s: float = 0.0
    ) -> None:
        """Record a group whose leader cannot speak for itself, and fence it."""
        if entry.group_id not in self._groups:
            return  # somebody else was first
        if kind is Kind.CRASH and await asyncio.to_thread(nodes.is_gone, entry.node_id):
            words = f"node {entry.node} is gone: its raylet does not answer"
        what = f"{words} (pid {entry.pid} on {entry.node})"
        cause = Evidence(
            kind=kind, summary=what, node=entry.node, pid=entry.pid, phase="leader", after_s=after_s
        )
        record = FirstCause(cause=cause, folded=(f"a gateway: {seen}",) if seen else ())
        await self.fail(
            Failure(
                who=entry.group_id,
                kind="GroupFailed",
                cause=what,
                seat=entry.seat,
                record=record.to_wire(),
            )
        )

    def _stands_by(self, seat: str) -> bool:
        return time.monotonic() - self._asked_s.get(seat, -math.inf) < 2 * PROMOTION_POLL_S

    async def _replace(self, lost: GroupEntry) -> None:
        """Have a spare group take a lost one's place, whose seat becomes the spare's."""
        wanted = [lost.model, lost.revision]
        ready = [s for s, of in self._spares.items() if of == wanted and self._stands_by(s)]
        if not ready:
            return
        self._spares[lost.seat] = wanted
        self._stands_in[ready[0]] = lost.seat
        await self.promote(ready[0])
        await self.note("spare", ready[0], f"takes the place of {lost.seat}")

    def _fence(self, entry: GroupEntry) -> None:
        """Refuse a group from now on, and see that its processes end."""
        self._forget(entry.group_id)
        self._fenced = [*self._fenced, entry.group_id][-_KEEP_FENCED:]
        store.put("fenced", self._fenced)
        self._bump()
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
        for group_id in [one for one, at_s in self._expiry_s.items() if at_s <= now_s]:
            silent_s = now_s - self._renewed_s[group_id]
            del self._expiry_s[group_id]
            words = f"its leader has not been heard for {silent_s:.1f} s"
            entry = self._groups[group_id]
            self._in_background(self._lost(entry, Kind.SILENT, words, "", after_s=silent_s))
        for gateway_id in [one for one, at_s in self._gateway_expiry_s.items() if at_s <= now_s]:
            del self._gateway_expiry_s[gateway_id]
            self._gateways.pop(gateway_id, None)

    def _keep(self) -> None:
        with contextlib.suppress(RuntimeError):  # Ray's store is away while its head restarts
            store.put("history", self._history.to_wire())

    def _bump(self) -> None:
        self._version += 1
        self._moved.set()


def connect() -> ActorHandle[Registry]:
    """The cluster's registry, made if there is none."""
    handle: ActorHandle[Registry] = (
        ray.remote(Registry)
        .options(  # type: ignore[assignment]
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            enable_task_events=False,  # as Serve's own: calls by the second, kept by the head
            resources=nodes.ON_HEAD,
            max_restarts=-1,
            max_task_retries=3,
            max_concurrency=1000,
        )
        .remote()
    )
    return handle

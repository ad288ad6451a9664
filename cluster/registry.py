"""Which groups serve now, for the gateways to follow: one small named actor.

Knows addresses, leases and words of progress; knows nothing of models, requests or placement.
Nothing in it outlives a restart: leaders renew their entries every health period, so a registry
that Ray restarts fills again within one.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

NAME = "registry"
NAMESPACE = "arriero"
_POLL_S = 20.0
_GATEWAY_LEASE_S = 3 * _POLL_S
_KEEP_FAILURES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupEntry:
    """One serving group.

    Attributes:
        group_id: unique among all groups that ever were.
        model: its name.
        address: of the leader's link.
        layout: words for people, such as "TP1 x PP2 bfloat16".
        slice_pids: processes of its slices, by rank.
        stats: the engine's counters at the last renewal.
        link_token: what its leader asks gateways for.
    """

    group_id: str
    model: str
    address: str
    layout: str = ""
    slice_pids: tuple[int, ...] = ()
    stats: dict[str, Any] = field(default_factory=dict)
    link_token: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a group or a gateway failed: its id, the error's class, and the cause in words."""

    who: str
    kind: str
    cause: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """A snapshot.

    Attributes:
        version: counts changes of `groups`.
        groups: those that serve.
        gateways: gRPC address of each gateway, by its id.
        http: HTTP address of each gateway that has one, by its id.
        progress: how far starts are, by group id.
        failures: the latest ones, newest last.
    """

    version: int
    groups: tuple[GroupEntry, ...]
    gateways: dict[str, str]
    progress: dict[str, str]
    failures: tuple[Failure, ...]
    http: dict[str, str] = field(default_factory=dict)


class Registry:
    """The actor behind `connect()`; every method answers at once but `changed`."""

    def __init__(self) -> None:
        self._version = 0
        self._groups: dict[str, GroupEntry] = {}
        self._expiry_s: dict[str, float] = {}
        self._gateways: dict[str, str] = {}
        self._http: dict[str, str] = {}
        self._gateway_expiry_s: dict[str, float] = {}
        self._progress: dict[str, str] = {}
        self._failures: list[Failure] = []
        self._moved = asyncio.Event()

    async def register(self, entry: GroupEntry, lease_s: float) -> None:
        """Add or renew a group; it is dropped when not renewed within `lease_s` seconds."""
        known = self._groups.get(entry.group_id)
        self._groups[entry.group_id] = entry
        self._expiry_s[entry.group_id] = time.monotonic() + lease_s
        self._progress.pop(entry.group_id, None)
        if known is None or known.address != entry.address:
            self._bump()

    async def unregister(self, group_id: str) -> None:
        """Forget a group; safe when it is not there."""
        self._expiry_s.pop(group_id, None)
        self._progress.pop(group_id, None)
        if self._groups.pop(group_id, None) is not None:
            self._bump()

    async def report(self, group_id: str, text: str) -> None:
        """Say how far a group's start is."""
        self._progress[group_id] = text

    async def fail(self, failure: Failure) -> None:
        """Say why a group or a gateway failed, and forget it."""
        self._failures = [*self._failures, failure][-_KEEP_FAILURES:]
        self._forget_gateway(failure.who)
        await self.unregister(failure.who)

    async def gateway(self, gateway_id: str, address: str | None, http: str | None = None) -> None:
        """Say where a gateway listens, now and then, or with None that it no longer does."""
        self._forget_gateway(gateway_id)
        self._gateway_expiry_s[gateway_id] = time.monotonic() + _GATEWAY_LEASE_S
        if address is not None:
            self._gateways[gateway_id] = address
            if http is not None:
                self._http[gateway_id] = http

    async def changed(self, version: int) -> Board:
        """The board as soon as its version is not `version`, or after 20 s as it is."""
        deadline_s = time.monotonic() + _POLL_S
        while self._version == version and (left_s := deadline_s - time.monotonic()) > 0:
            self._moved.clear()
            nearest_s = min(self._expiry_s.values(), default=deadline_s) - time.monotonic()
            try:
                await asyncio.wait_for(self._moved.wait(), max(0.01, min(left_s, nearest_s)))
            except TimeoutError:
                self._expire()
        return await self.board()

    async def board(self) -> Board:
        """The board now."""
        self._expire()
        return Board(
            version=self._version,
            groups=tuple(self._groups.values()),
            gateways=dict(self._gateways),
            progress=dict(self._progress),
            failures=tuple(self._failures),
            http=dict(self._http),
        )

    def _expire(self) -> None:
        now_s = time.monotonic()
        late = [group for group, expiry_s in self._expiry_s.items() if expiry_s <= now_s]
        for group_id in late:
            del self._expiry_s[group_id]
            del self._groups[group_id]
        if late:
            self._bump()
        for gateway_id in [one for one, at_s in self._gateway_expiry_s.items() if at_s <= now_s]:
            del self._gateway_expiry_s[gateway_id]
            self._forget_gateway(gateway_id)

    def _forget_gateway(self, gateway_id: str) -> None:
        self._gateways.pop(gateway_id, None)
        self._http.pop(gateway_id, None)

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
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote()
    )
    return handle

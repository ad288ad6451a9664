"""The registry's view of a group: name and epoch, progress of the start, entry, failure.

Knows the registry's methods; knows nothing of engines and processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle

from arriero.cluster.hosts.nodes import node_address
from arriero.cluster.registry.history import Failure
from arriero.cluster.registry.registry import Registry
from arriero.cluster.registry.snapshot import GroupEntry
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.slice_actor import SliceLocation
from arriero.cluster.spec.live_settings import LiveSettings
from arriero.shards.protocol.failure import FirstCause

if TYPE_CHECKING:
    from arriero.shards.engine.stats import EngineStats
    from arriero.shards.leader.loading import Loading

LEASE_PERIODS = 5


class Registration:
    """A group's dealings with the registry.

    Args:
        registry: of the cluster.
        settings: of the group.

    Attributes:
        epoch: of the group; 0 before `begin`.
        group_id: seat and epoch; the seat alone before `begin`.
        entry: registry entry without statistics; None until the group has registered.
    """

    def __init__(self, registry: ActorHandle[Registry], settings: GroupSettings) -> None:
        self.registry = registry
        self.epoch = 0
        self.group_id = settings.seat
        self.entry: GroupEntry | None = None
        self._settings = settings
        self._percent_loaded = -1

    async def begin(self) -> None:
        """Get an epoch of the seat."""
        self.epoch = await self.registry.next_epoch.remote(self._settings.seat)
        self.group_id = f"{self._settings.seat}.{self.epoch}"

    async def is_promoted(self) -> bool:
        """Whether the group may serve at once; False for a spare group."""
        return bool(await self.registry.wait_for_promotion.remote(self._settings.seat, 0.0))

    def report(self, text: str) -> None:
        """Report the progress of the start."""
        self.registry.report.remote(self.group_id, text)

    def report_loading(self, loading: Loading) -> None:
        """Report the progress of loading, once per percent."""
        percent = int(loading.share * 100)
        if percent != self._percent_loaded:
            self._percent_loaded = percent
            self.report(str(loading))

    def report_processes(self, slices: Sequence[SliceLocation]) -> None:
        """Report the processes of the group, whose logs can be read from now on."""
        self.registry.starting.remote(self._entry(slices, phase="starting"))

    async def register(
        self,
        *,
        address: str,
        digest: str,
        link_token: str,
        slices: Sequence[SliceLocation],
        stats: EngineStats,
        start_s: float,
    ) -> bool:
        """Add the group to the registry; False when the registry has fenced the group.

        Args:
            address: of the leader's link.
            digest: of weights and numerics.
            link_token: secret that gateways must send.
            slices: locations, by rank.
            stats: counters of the engine.
            start_s: seconds from placed slices to the first token.
        """
        entry = self._entry(slices, phase="serving")
        self.entry = replace(
            entry, address=address, digest=digest, link_token=link_token, start_s=start_s
        )
        return await self.renew(stats, draining=False) is not None

    def _entry(self, slices: Sequence[SliceLocation], *, phase: str) -> GroupEntry:
        settings = self._settings
        return GroupEntry(
            group_id=self.group_id,
            model=settings.model,
            address="",
            seat=settings.seat,
            epoch=self.epoch,
            revision=settings.revision,
            layout=settings.layout,
            phase=phase,
            node=node_address(),
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            slice_pids=tuple(location.pid for location in slices),
            slice_nodes=tuple(location.address for location in slices),
            slice_node_ids=tuple(location.node_id for location in slices),
        )

    async def renew(self, stats: EngineStats, *, draining: bool) -> int | None:
        """Renew the entry.

        Returns:
            The version of the live settings; None when the registry has fenced the group.
        """
        assert self.entry is not None, "a group registers before it renews"
        phase = "draining" if draining else "serving"
        entry = replace(self.entry, stats=stats, phase=phase)
        lease_s = LEASE_PERIODS * self._settings.period_s
        version: int | None = await self.registry.register.remote(entry, lease_s)
        return version

    def set_digest(self, digest: str) -> None:
        """Register another digest of weights and numerics, with the next renewal."""
        if self.entry is not None:
            self.entry = replace(self.entry, digest=digest)

    async def live(self) -> LiveSettings | None:
        """The settings that `reload` changed since the deployment, or None."""
        live: LiveSettings | None = await self.registry.live.remote()
        return live

    async def fail(self, kind: str, cause: str, record: FirstCause | None) -> None:
        """Record the failure of the group.

        Args:
            kind: class of the error.
            cause: text for people.
            record: the first cause with its evidence; None for none.
        """
        failure = Failure(
            who=self.group_id,
            kind=kind,
            cause=cause,
            seat=self._settings.seat,
            record=record,
        )
        await self.registry.fail.remote(failure)

    async def end(self) -> None:
        """Remove the group, which has ended as planned."""
        await self.registry.unregister.remote(self.group_id)

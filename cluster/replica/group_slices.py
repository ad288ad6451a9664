"""The slice actors of a group: placement, runs and losses.

The placement group of the leader's replica has one bundle for the leader, then a bundle for each S
slices that must share a node; rank r is in bundle r // S + 1. The node of a bundle may change from
start to start, so ranks follow bundles, not nodes. Knows Ray actors and nodes; knows nothing of the
work of a slice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.nodes import node_address
from arriero.cluster.replica.group_settings import GroupSettings
from arriero.cluster.replica.slice_actor import SliceActor, SliceLocation
from arriero.kernels.cpu.topology import Place
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CollectiveFailed
from arriero.shards.protocol.failure import Evidence, Kind

if TYPE_CHECKING:
    from arriero.shards.leader.remote_executor import RemoteExecutor

STOP_LIMIT_S = 3.0
"""Longest wait in seconds for slices that were told to stop."""


class GroupSlices:
    """The slices of a group; for use in one event loop.

    Attributes:
        actors: handles of the `SliceActor`s, by rank.
        locations: by rank; empty before `place` returns.
    """

    def __init__(self, settings: GroupSettings) -> None:
        self._settings = settings
        self.actors: list[Any] = []
        self.locations: list[SliceLocation] = []
        self._runs: list[asyncio.Task[None]] = []
        self._ending = False

    async def place(self) -> None:
        """Start the slices in all bundles except the leader's."""
        config = self._settings.config
        bundles = ray.util.get_current_placement_group()
        assert bundles is not None, "a leader runs in a placement group"
        actor = ray.remote(SliceActor)
        for rank in range(config.world_size):
            options = actor.options(
                num_cpus=self._settings.cpus_per_slice,
                num_gpus=1 if config.device == "cuda" else 0,
                max_restarts=0,
                enable_task_events=False,
                max_concurrency=2,  # `run`, and one other method meanwhile
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=bundles,
                    placement_group_bundle_index=rank // self._settings.slices_per_bundle + 1,
                ),
            )
            self.actors.append(options.remote(self._settings.log_level, self._settings.log_format))
        self.locations = list(
            await asyncio.gather(*[actor.location.remote() for actor in self.actors])
        )

    def link_host(self) -> str | None:
        """Address to bind the executor's sockets to; None when all slices are on this node."""
        here = ray.get_runtime_context().get_node_id()
        if all(location.node_id == here for location in self.locations):
            return None
        return node_address()

    def with_threads(self, config: GroupConfig) -> GroupConfig:
        """Set `threads`: the cores of each node, divided among the slices on the node."""
        if config.threads is not None:
            return config
        num_slices = Counter(location.node_id for location in self.locations)
        threads = min(
            max(1, location.cores // num_slices[location.node_id]) for location in self.locations
        )
        return replace(config, threads=threads)

    async def free_bytes(self) -> list[int]:
        """Free bytes on the GPU of each slice, by rank."""
        return list(await asyncio.gather(*[actor.free_bytes.remote() for actor in self.actors]))

    def run(self, executor: RemoteExecutor) -> None:
        """Start each slice's run; reports the end of a run to the executor as evidence."""
        num_slices = Counter(location.node_id for location in self.locations)
        placed: Counter[str] = Counter()
        for rank, actor in enumerate(self.actors):
            location = self.locations[rank]
            place = Place(placed[location.node_id], num_slices[location.node_id])
            placed[location.node_id] += 1
            run = actor.run.remote(rank, executor.endpoint, location.address, place)
            self._runs.append(asyncio.create_task(self._watch(rank, run, executor)))

    async def _watch(self, rank: int, run: Any, executor: RemoteExecutor) -> None:  # noqa: ANN401
        """Wait for the end of a slice's run: a failure, unless the group is ending."""
        location = self.locations[rank]
        name = f"slice {rank} (pid {location.pid} on {location.address})"
        kind = Kind.CRASH
        try:
            await run
            summary = f"{name} stopped"
        except ray.exceptions.RayTaskError as error:  # the slice has sent better evidence itself
            kind = Kind.ABORTED if isinstance(error.cause, CollectiveFailed) else Kind.ERROR
            summary = f"{name} failed: {error.cause}"
        except ray.exceptions.RayError:
            summary = f"{name} died"
        if self._ending:
            return
        if kind is Kind.CRASH and await asyncio.to_thread(nodes.is_gone, location.node_id):
            summary = (
                f"node {location.address} is gone (its raylet does not answer), and with it {name}"
            )
        executor.report(
            Evidence(kind=kind, summary=summary, rank=rank, node=location.address, pid=location.pid)
        )

    async def log_tail(self, rank: int, count: int, limit_s: float) -> list[str]:
        """The last log lines of a slice's process; waits up to `limit_s` seconds."""
        location = self.locations[rank]
        return await nodes.log_tail(location.node_id, location.pid, count, limit_s)

    def set_log_level(self, level: str, log_format: str) -> None:
        """Set the log level of all slices, without waiting."""
        for actor in self.actors:
            actor.set_log_level.remote(level, log_format)

    def expect_end(self) -> None:
        """From now on the end of a run is no failure."""
        self._ending = True

    async def close(self) -> None:
        """Wait for the end of all runs, some seconds at most, and end the processes."""
        if self._runs:
            await asyncio.wait(self._runs, timeout=STOP_LIMIT_S)
        for run in self._runs:
            run.cancel()
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    async def kill(self) -> None:
        """Kill the processes of all slices."""
        await nodes.kill_all([(location.node_id, location.pid) for location in self.locations])

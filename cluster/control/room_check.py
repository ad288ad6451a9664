"""Room of the cluster at this moment for what the desired state would become.

Reads the nodes in a thread; the counts are those of `capacity_check`. Knows the desired state and
the nodes; knows nothing of changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from arriero.cluster.control.placement_tracker import has_free_group
from arriero.cluster.control.rollout_plan import ModelRoom
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.planner.capacity_check import (
    WantedGroups,
    check_gateways,
    check_prompt_guard,
    most_groups,
    refuse_beyond,
)
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.model import ModelSpec


class RoomCheck:
    """Compares wanted groups with the nodes of the cluster.

    Args:
        store: the desired state.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store

    async def refuse(
        self, spec: DeploymentSpec, models: Iterable[ModelSpec], counts: Mapping[str, int]
    ) -> None:
        """Refuse groups, gateways and a new Prompt Guard that the cluster can never hold.

        Args:
            spec: the spec after the change; decides the CPUs of a slice on a local cluster.
            models: settings of all models after the change.
            counts: number of groups of each model after the change.

        Raises:
            SpecError: names the model, the field, its value, the limit and a remedy.
        """

        def check() -> None:
            capacity = self._store.read_capacity(spec)
            wanted = [WantedGroups.of(model, counts[model.name], capacity) for model in models]
            refuse_beyond(capacity, wanted, self._store.wanted_groups())
            gateway, before = spec.gateway, self._store.spec.gateway
            if gateway.count > before.count:
                check_gateways(spec, len(capacity.nodes))
            if gateway.prompt_guard is not None and gateway.prompt_guard != before.prompt_guard:
                check_prompt_guard(wanted, gateway.count, capacity)

        await asyncio.to_thread(check)

    async def read(self, spec: DeploymentSpec, *, keep_counts: bool) -> dict[str, ModelRoom]:
        """Room for each model of a spec.

        Args:
            spec: the spec after the change.
            keep_counts: the numbers of groups stay as they are, whatever the spec says.
        """
        return await asyncio.to_thread(self._read, spec, keep_counts)

    def _read(self, spec: DeploymentSpec, keep_counts: bool) -> dict[str, ModelRoom]:
        capacity, state = self._store.read_capacity(spec), self._store.state
        wanted = [
            WantedGroups.of(
                model, state.models[model.name].count if keep_counts else model.groups, capacity
            )
            for model in spec.models
        ]
        room = {}
        for entry in wanted:
            others = [other for other in wanted if other is not entry]
            room[entry.model.name] = ModelRoom(
                count=entry.count,
                most=most_groups(entry.model, capacity, others, entry.memory),
                has_extra=has_free_group(entry.model, capacity, state.drained_nodes),
            )
        return room

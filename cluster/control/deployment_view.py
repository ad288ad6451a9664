"""The desired and the current state of the deployment, as `reconcile` and Admin read them.

Knows stored state, registry snapshots and Serve's failures; changes nothing.
"""

from __future__ import annotations

from arriero.cluster.control.applications import Applications
from arriero.cluster.control.node_drain import leaving
from arriero.cluster.control.placement_tracker import PlacementTracker
from arriero.cluster.control.reconcile import DesiredModel, GroupSeat, Phase
from arriero.cluster.control.state_store import StateStore
from arriero.cluster.planner.capacity_check import can_hold, most_groups
from arriero.cluster.planner.group_memory import group_memory
from arriero.cluster.registry.snapshot import RegistrySnapshot


class DeploymentView:
    """Desired models and current seats.

    Args:
        store: the desired state.
        applications: which groups Serve could not deploy.
        placements: which groups wait for a placement.
    """

    def __init__(
        self, store: StateStore, applications: Applications, placements: PlacementTracker
    ) -> None:
        self._store, self._applications, self._placements = store, applications, placements
        self._spares: frozenset[str] = frozenset()  # spare seats of the last snapshot
        self._leaving: dict[str, frozenset[str]] = {}  # by model, seats on drained nodes

    @property
    def gateways_settled(self) -> bool:
        """Whether all gateways run with the current spec."""
        return not self._applications.replacing_gateways

    def observe(self, snapshot: RegistrySnapshot) -> None:
        """Take in the registry's state; call before `desired_models` and `seats`."""
        self._spares = frozenset(snapshot.spares)
        drained = self._store.state.drained_nodes
        self._leaving = {}
        if drained:
            entries = (*snapshot.groups, *snapshot.starting)
            self._leaving = leaving(drained, entries, self._has_room)

    def _has_room(self, model: str) -> bool:
        """Whether the nodes that are not drained can hold all groups of a model."""
        wanted = self._store.wanted_groups()
        others = [entry for entry in wanted if entry.model.name != model]
        entry = next((entry for entry in wanted if entry.model.name == model), None)
        capacity = self._store.read_capacity(self._store.spec)
        return entry is not None and entry.count <= most_groups(
            entry.model, capacity, others, entry.memory
        )

    def desired_models(self) -> dict[str, DesiredModel]:
        """The desired state of each model."""
        desired = {}
        for name, model in self._store.state.models.items():
            settings = self._store.settings(name)
            surge = self._placements.surge(
                settings,
                self._store.capacity,
                num_seats=self._store.state.groups_in(name, self._spares),
                count=model.count,
                without=self._store.state.drained_nodes,
            )
            desired[name] = DesiredModel(
                revision=model.current.number,
                count=model.count,
                surge=surge,
                drained=frozenset(model.drained) | self._leaving.get(name, frozenset()),
                paused=model.paused,
                spares=settings.spares,
                fits=self._fits(name, model.current.number),
            )
        return desired

    def _fits(self, model: str, revision: int) -> bool:
        """Whether the cluster could hold a group of the revision that replaces others."""
        seats = self._store.state.seats.values()
        if all(seat.revision == revision for seat in seats if seat.model == model):
            return True  # the revision replaces none
        capacity = self._store.read_capacity(self._store.spec)
        settings = self._store.settings(model)
        return can_hold(settings, capacity, group_memory(settings, capacity.device(settings)))

    def seats(self, snapshot: RegistrySnapshot) -> list[GroupSeat]:
        """The current state of each seat."""
        serving = {group.seat: group for group in snapshot.groups if group.phase == "serving"}
        seats = []
        for name, seat in self._store.state.seats.items():
            if seat.stopping:
                phase = Phase.STOPPING
            elif name in serving:
                phase = Phase.SERVING
            elif name in snapshot.standby:
                phase = Phase.STANDBY
            else:
                phase = Phase.FAILED if name in self._applications.failed else Phase.STARTING
            load = 0 if name not in serving else serving[name].stats.num_running
            seats.append(
                GroupSeat(
                    name=name,
                    model=seat.model,
                    revision=seat.revision,
                    phase=phase,
                    load=load,
                    spare=name in self._spares,
                )
            )
        return seats

    def surplus_models(self) -> set[str]:
        """Models with more groups than desired, spare groups left out."""
        return {
            name
            for name, model in self._store.state.models.items()
            if self._store.state.groups_in(name, self._spares) > model.count
        }

    def start_problem(self, seat: str) -> str:
        """Why the group of a seat did not start, or still waits; "" for no problem."""
        if seat in self._applications.failed:
            return self._applications.failed[seat]
        model = self._store.state.seats[seat].model
        if model not in self._store.state.models:
            return ""  # the model is no longer wanted, and the group ends
        settings, drained = self._store.settings(model), self._store.state.drained_nodes
        return self._placements.problem(seat, settings, self._store.capacity, drained)

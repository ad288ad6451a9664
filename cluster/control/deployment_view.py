"""The desired and the current state of the deployment, as `reconcile` and Admin read them.

Knows stored state, registry snapshots and Serve's failures; changes nothing.
"""

from __future__ import annotations

from arriero.cluster.control.applications import Applications
from arriero.cluster.control.placement_tracker import PlacementTracker
from arriero.cluster.control.reconcile import DesiredModel, GroupSeat, Phase
from arriero.cluster.control.state_store import StateStore
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

    @property
    def gateways_settled(self) -> bool:
        """Whether all gateways run with the current spec."""
        return not self._applications.replacing_gateways

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
            )
            desired[name] = DesiredModel(
                revision=model.current.number,
                count=model.count,
                surge=surge,
                drained=frozenset(model.drained),
                spares=settings.spares,
            )
        return desired

    def seats(self, snapshot: RegistrySnapshot) -> list[GroupSeat]:
        """The current state of each seat."""
        self._spares = frozenset(snapshot.spares)
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
            load = 0 if name not in serving else serving[name].stats.get("num_running", 0)
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
        settings = self._store.settings(self._store.state.seats[seat].model)
        return self._placements.problem(seat, settings, self._store.capacity)

"""Seats whose group still waits for a placement, and models without room for an extra group.

During an update a model may have one group more than its count, where the cluster seems to have
room. When that group finds no placement in `PLACEMENT_S` seconds, the operator gives the group up
and updates without an extra group. Knows seats, bundles and free resources; knows nothing of Ray
Serve.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping

from arriero.cluster.control.reconcile import GroupSeat, Phase
from arriero.cluster.hosts import nodes
from arriero.cluster.hosts.capacity import ClusterCapacity
from arriero.cluster.spec.model import ModelSpec

_REPORT_AFTER_S = 3.0
"""Seconds of waiting after which `problem` reports a seat."""
PLACEMENT_S = 20.0
"""Seconds after which an extra group without a placement is given up."""
CROWDED_S = 600.0
"""Seconds after giving up until another extra group of the model may start."""


class PlacementTracker:
    """Records since when each seat waits, and until when each model is crowded."""

    def __init__(self) -> None:
        self._waiting_since_s: dict[str, float] = {}
        self._crowded_until_s: dict[str, float] = {}

    def problem(
        self,
        seat: str,
        model: ModelSpec,
        capacity: ClusterCapacity,
        without: Collection[str] = (),
    ) -> str:
        """A text for people when a seat has waited some seconds; "" otherwise.

        Args:
            seat: the seat.
            model: settings of the seat's model.
            capacity: of the cluster.
            without: ids of drained nodes.
        """
        since_s = self._waiting_since_s.get(seat)
        waits_s = 0.0 if since_s is None else time.monotonic() - since_s
        if since_s is None or waits_s < _REPORT_AFTER_S:
            return ""
        bundles = capacity.bundles(model)
        num_free = nodes.count_free_bundles(bundles[0], without)
        if waits_s < PLACEMENT_S and num_free >= len(bundles):
            return ""  # there is room: the placement is under way
        labels = model.placement.labels
        where = f", on nodes with the labels {labels}" if labels else ""
        return f"waits for a placement: {_shortage(bundles, without)}{where}"

    def surge(
        self,
        model: ModelSpec,
        capacity: ClusterCapacity,
        *,
        num_seats: int,
        count: int,
        without: Collection[str] = (),
    ) -> int:
        """Number of extra groups, 0 or 1, that the cluster has room for.

        Args:
            model: settings of the model.
            capacity: of the cluster.
            num_seats: current number of the model's seats, without spare groups.
            count: desired number of groups.
            without: ids of drained nodes.
        """
        if self._crowded_until_s.get(model.name, 0.0) > time.monotonic():
            return 0
        if num_seats != count:
            return 1  # the extra group exists already, or the model needs none yet
        return int(has_free_group(model, capacity, without))

    def give_up(
        self, seats: Iterable[GroupSeat], started: Collection[str], surplus: Collection[str]
    ) -> list[str]:
        """Seats to stop: extra groups that found no placement; their models count as crowded.

        Args:
            seats: all seats.
            started: seats whose group has a placement and reports progress.
            surplus: models with more groups than desired.
        """
        now_s = time.monotonic()
        stuck = []
        for seat in seats:
            if seat.phase is not Phase.STARTING or seat.name in started:
                self._waiting_since_s.pop(seat.name, None)
                continue
            since_s = self._waiting_since_s.setdefault(seat.name, now_s)
            if seat.spare or seat.model not in surplus:
                continue  # a spare group waits for room without a limit
            if now_s - since_s > PLACEMENT_S:
                self._crowded_until_s[seat.model] = now_s + CROWDED_S
                stuck.append(seat.name)
        return stuck


def has_free_group(
    model: ModelSpec, capacity: ClusterCapacity, without: Collection[str] = ()
) -> bool:
    """Whether a further group of a model has room now, outside of the nodes `without`."""
    bundles = capacity.bundles(model)
    return nodes.count_free_bundles(bundles[0], without) >= len(bundles)


def _shortage(bundles: list[dict[str, float]], without: Collection[str]) -> str:
    """What the bundles of a group need, and what is free, in words."""
    needed, most_free = bundles[0], nodes.most_free(bundles[0], without)
    words = f"it needs {_amounts(needed)} on one node"
    if len(bundles) > 1:
        words = f"it needs {len(bundles)} times {_amounts(needed)}, each on one node"
        words += f"; {nodes.count_free_bundles(needed, without)} of these are free now"
    return f"{words}; the node with most has {_amounts(most_free)} free"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{amount:g} {name}{'s' if amount != 1 else ''}"
        for name, amount in resources.items()
        if not name.startswith("accelerator_type:")
    ) + "".join(
        f" of type {name.partition(':')[2]}"
        for name in resources
        if name.startswith("accelerator_type:")
    )

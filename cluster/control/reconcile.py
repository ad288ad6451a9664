"""The next actions that bring the groups of a deployment to the desired state.

One state machine serves `up`, `scale`, `drain`, rolling update, roll-back and replacement. Input:
the desired state of each model (revision of its settings, number of groups) and the seats of the
deployment. Output: actions. Sans-I/O: the operator calls `reconcile` again after each change, and
an action that was taken shows in the seats of the next call.

Phases of a seat:  starting ─▶ serving ─▶ stopping ─▶ (gone)
                      ├── failed ────────────┤
                      └── standby (a spare) ─┘

"stopping" includes draining: the streams of a group end or move before its processes end. A spare
group starts without weights in device memory; after its promotion it loads them and serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Phase of a seat."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    FAILED = "failed"
    STANDBY = "standby"


@dataclass(frozen=True, kw_only=True, slots=True)
class DesiredModel:
    """Desired state of a model.

    Attributes:
        revision: of the model's settings; groups of another revision are replaced.
        count: number of groups.
        surge: groups beyond `count` that may exist during a replacement. With 0, a group stops
            before its successor starts.
        drained: names of seats that must stop whatever their revision.
        paused: the rollout is paused: groups of earlier revisions that serve stay, and count.
        fits: the cluster could hold a group of the revision. If not, no group that serves stops in
            favour of the revision.
        spares: number of groups on standby, beside `count`.
    """

    revision: int
    count: int
    surge: int = 1
    spares: int = 0
    drained: frozenset[str] = frozenset()
    paused: bool = False
    fits: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSeat:
    """The place of a group in the deployment.

    Attributes:
        name: for example "smollm2-0".
        model: name of the model.
        revision: of the model's settings.
        phase: current phase.
        load: requests that run in the group; the group with the least load stops first.
        spare: the group is for standby.
    """

    name: str
    model: str
    revision: int
    phase: Phase
    load: int = 0
    spare: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start a group of a revision in a new seat; a spare group stops at standby."""

    seat: str
    model: str
    revision: int
    spare: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Promote:
    """Let the spare group of a seat serve."""

    seat: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Drain the group of a seat, then end the group."""

    seat: str
    why: str


Action = Start | Promote | Stop


def reconcile(
    desired_models: Mapping[str, DesiredModel], seats: Iterable[GroupSeat]
) -> list[Action]:
    """The next actions; empty when the desired state is reached or an action is still under way."""
    by_model: dict[str, list[GroupSeat]] = {model: [] for model in desired_models}
    actions: list[Action] = []
    for seat in seats:
        if seat.model in desired_models:
            by_model[seat.model].append(seat)
        elif seat.phase is not Phase.STOPPING:
            actions.append(Stop(seat=seat.name, why="its model is no longer wanted"))
    for model, desired in desired_models.items():
        actions += _reconcile_model(model, desired, by_model[model])
    return actions


def settled(desired_models: Mapping[str, DesiredModel], seats: Iterable[GroupSeat]) -> bool:
    """Whether the desired state is reached; spare groups do not count."""
    seats = [seat for seat in seats if not seat.spare]
    if any(seat.phase is not Phase.SERVING or seat.model not in desired_models for seat in seats):
        return False
    return all(
        [seat.revision for seat in seats if seat.model == model]
        == [desired.revision] * desired.count
        and not any(seat.name in desired.drained for seat in seats)
        for model, desired in desired_models.items()
    )


def spares_settled(desired_models: Mapping[str, DesiredModel], seats: Iterable[GroupSeat]) -> bool:
    """Whether the desired number of spare groups is on standby."""
    spares = [seat for seat in seats if seat.spare]
    return all(
        [(seat.revision, seat.phase) for seat in spares if seat.model == model]
        == [(desired.revision, Phase.STANDBY)] * desired.spares
        for model, desired in desired_models.items()
    )


def _reconcile_model(model: str, desired: DesiredModel, seats: list[GroupSeat]) -> list[Action]:
    spares = [seat for seat in seats if seat.spare]
    useless = [
        seat
        for seat in spares
        if seat.phase is Phase.FAILED
        or (seat.revision != desired.revision and not desired.paused)
        or seat.name in desired.drained
    ]
    # A useless spare group only takes room; a seat that is stopping already needs no action.
    if stopping := [seat for seat in useless if seat.phase is not Phase.STOPPING]:
        return [Stop(seat=seat.name, why="a spare group that is of no use") for seat in stopping]
    ready = [seat for seat in spares if seat.phase is Phase.STANDBY and seat not in useless]
    taken = {seat.name for seat in seats}
    mains = [seat for seat in seats if not seat.spare]
    if actions := _reconcile_serving(model, desired, mains, ready, taken):
        return actions
    if any(seat.phase is not Phase.SERVING or seat.revision != desired.revision for seat in mains):
        return []  # groups that serve come before spare groups
    alive = [seat for seat in spares if seat.phase is not Phase.STOPPING]
    if surplus := len(alive) - desired.spares:
        if surplus > 0:
            why = "the spec asks for fewer spare groups"
            return [Stop(seat=seat.name, why=why) for seat in alive[:surplus]]
        return [
            Start(seat=name, model=model, revision=desired.revision, spare=True)
            for name in _free_names(model, taken, -surplus)
        ]
    return []


def _reconcile_serving(
    model: str,
    desired: DesiredModel,
    seats: list[GroupSeat],
    ready: list[GroupSeat],
    taken: set[str],
) -> list[Action]:
    """Actions for the groups that serve; `ready` are spare groups on standby."""
    alive = [seat for seat in seats if seat.phase is not Phase.STOPPING]
    current, extra = _current(desired, alive)
    outdated = [seat for seat in alive if seat not in current]
    serving = [seat for seat in alive if seat.phase is Phase.SERVING]

    # Scale down, all at once; groups that still start, or run the fewest requests, stop first.
    surplus = len(current) - desired.count - extra
    if surplus > 0:
        current.sort(key=lambda seat: (seat.phase is Phase.SERVING, seat.load, seat.name))
        why = "the model needs fewer groups"
        return [Stop(seat=seat.name, why=why) for seat in current[:surplus]]

    # An outdated group that does not serve carries no load.
    if idle := [seat for seat in outdated if seat.phase is not Phase.SERVING]:
        return [Stop(seat=seat.name, why="a newer group replaces it") for seat in idle]

    missing = desired.count - len(current)
    if missing > 0 and ready:
        return [Promote(seat=seat.name) for seat in ready[:missing]]
    if missing > 0:
        room = desired.count + desired.surge - len(seats)
        starting = sum(seat.phase is Phase.STARTING for seat in current)
        # During a replacement one group at a time; otherwise all at once.
        most = min(missing, room) if not outdated else min(missing, room, 1 - starting)
        if most > 0:
            return [
                Start(seat=name, model=model, revision=desired.revision)
                for name in _free_names(model, taken, most)
            ]

    # One outdated group at a time, and only while the other groups carry the load.
    if outdated and len(alive) == len(seats):
        extra = len(serving) - desired.count
        stoppable = outdated
        if extra <= 0 and not desired.fits:  # the successor could not start
            stoppable = [seat for seat in outdated if seat.name in desired.drained]
        if stoppable and extra >= 0 and (extra > 0 or desired.surge == 0 or desired.count == 0):
            first = min(stoppable, key=lambda seat: (seat.load, seat.name))
            drained = first.name in desired.drained
            why = "it is drained" if drained else f"revision {desired.revision} replaces it"
            return [Stop(seat=first.name, why=why)]
    return []


def _current(desired: DesiredModel, alive: list[GroupSeat]) -> tuple[list[GroupSeat], int]:
    """Groups that count as desired, and the number of groups beyond `count` that may stay."""
    here = [seat for seat in alive if seat.name not in desired.drained]
    current = [seat for seat in here if seat.revision == desired.revision]
    if not desired.paused:
        return current, 0
    kept = [
        seat for seat in here if seat.revision != desired.revision and seat.phase is Phase.SERVING
    ]
    return current + kept, desired.surge if kept else 0  # the extra group of the rollout stays too


def _free_names(model: str, taken: set[str], count: int) -> list[str]:
    names: list[str] = []
    index = 0
    while len(names) < count:
        name = f"{model}-{index}"
        if name not in taken:
            names.append(name)
        index += 1
    return names

"""What to do next so that the groups that are become the groups that are wanted.

One state machine for up, scale, drain, rolling update, roll-back and replacement: a wish for each
model (settings by revision, a count), the seats there are, and a pure function from both to
actions. Sans-I/O: it is asked again whenever something has changed, and an action that was taken is
seen in the seats the next time.

A seat's phases:  starting ─▶ serving ─▶ stopping ─▶ (gone)
                     ├── failed ────────────┤
                     └── standby (a spare) ─┘

Stopping includes draining: its streams end or move before its processes do. A spare is started as
far as it goes without weights in its devices' memory; promoted, it starts to serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Of a seat."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    FAILED = "failed"
    STANDBY = "standby"


@dataclass(frozen=True, kw_only=True, slots=True)
class DesiredModel:
    """What is wanted of one model.

    Attributes:
        revision: of its settings; groups of another revision are to be replaced.
        count: groups.
        surge: groups beyond `count` that may be there while others are replaced. With 0 a group
            is stopped before its successor starts.
        drained: seats that are to stop whatever their revision.
        paused: start nothing more: the revision does not start.
        spares: groups that stand by, beside `count`.
    """

    revision: int
    count: int
    surge: int = 1
    spares: int = 0
    drained: frozenset[str] = frozenset()
    paused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSeat:
    """The place of one group.

    Attributes:
        name: "smollm2-0".
        model: its model.
        revision: its settings'.
        phase: where it is.
        load: requests it runs; the least loaded one goes first.
        spare: it is to stand by.
    """

    name: str
    model: str
    revision: int
    phase: Phase
    load: int = 0
    spare: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start a group of a revision in a new seat; a spare one goes no further than standby."""

    seat: str
    model: str
    revision: int
    spare: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Promote:
    """Have the spare group of a seat serve."""

    seat: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Drain the group of a seat, then end it."""

    seat: str
    why: str


Action = Start | Promote | Stop


def reconcile(
    desired_models: Mapping[str, DesiredModel], seats: Iterable[GroupSeat]
) -> list[Action]:
    """The next actions; none when all is as wanted or something must be waited for."""
    by_model: dict[str, list[GroupSeat]] = {model: [] for model in desired_models}
    actions: list[Action] = []
    for seat in seats:
        if seat.model in desired_models:
            by_model[seat.model].append(seat)
        elif seat.phase is not Phase.STOPPING:
            actions.append(Stop(seat=seat.name, why="its model is no longer wanted"))
    for model, desired in desired_models.items():
        actions += _decide(model, desired, by_model[model])
    return actions


def settled(desired_models: Mapping[str, DesiredModel], seats: Iterable[GroupSeat]) -> bool:
    """Whether everything is as wanted, spares aside."""
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
    """Whether all the spares there should be stand by."""
    spares = [seat for seat in seats if seat.spare]
    return all(
        [(one.revision, one.phase) for one in spares if one.model == model]
        == [(desired.revision, Phase.STANDBY)] * desired.spares
        for model, desired in desired_models.items()
    )


def _decide(model: str, desired: DesiredModel, seats: list[GroupSeat]) -> list[Action]:
    spares = [seat for seat in seats if seat.spare]
    useless = [
        one
        for one in spares
        if one.phase is Phase.FAILED or one.revision != desired.revision or _doomed(one, desired)
    ]
    # no loss to anybody, and room for others; one that is stopping is seen to already
    if going := [one for one in useless if one.phase is not Phase.STOPPING]:
        return [Stop(seat=one.name, why="a spare group that is of no use") for one in going]
    ready = [one for one in spares if one.phase is Phase.STANDBY and one not in useless]
    taken = {seat.name for seat in seats}
    mains = [seat for seat in seats if not seat.spare]
    if actions := _decide_serving(model, desired, mains, ready, taken):
        return actions
    if any(one.phase is not Phase.SERVING or one.revision != desired.revision for one in mains):
        return []  # first those that serve
    alive = [one for one in spares if one.phase is not Phase.STOPPING]
    if surplus := len(alive) - desired.spares:
        if surplus > 0:
            why = "fewer spare groups are wanted"
            return [Stop(seat=one.name, why=why) for one in alive[:surplus]]
        if not desired.paused:
            return [
                Start(seat=name, model=model, revision=desired.revision, spare=True)
                for name in _free_names(model, taken, -surplus)
            ]
    return []


def _decide_serving(
    model: str,
    desired: DesiredModel,
    seats: list[GroupSeat],
    ready: list[GroupSeat],
    taken: set[str],
) -> list[Action]:
    """What to do for the groups that serve; `ready` are spares that can be had at once."""
    alive = [seat for seat in seats if seat.phase is not Phase.STOPPING]
    current = [
        one for one in alive if one.revision == desired.revision and not _doomed(one, desired)
    ]
    outdated = [one for one in alive if one not in current]
    serving = [one for one in alive if one.phase is Phase.SERVING]

    # too many of the right kind: scale down, all at once, those that start or idle first
    surplus = len(current) - desired.count
    if surplus > 0:
        current.sort(key=lambda one: (one.phase is Phase.SERVING, one.load, one.name))
        return [Stop(seat=one.name, why="fewer groups are wanted") for one in current[:surplus]]

    # what never served is no loss
    failed = [one for one in outdated if one.phase is not Phase.SERVING]
    if failed:
        return [Stop(seat=one.name, why="it was replaced") for one in failed]

    missing = desired.count - len(current)
    if missing > 0 and ready:
        return [Promote(seat=one.name) for one in ready[:missing]]
    if missing > 0 and not desired.paused:
        room = desired.count + desired.surge - len(seats)
        starting = sum(one.phase is Phase.STARTING for one in current)
        # while there is something to replace, one group at a time; else all at once
        most = min(missing, room) if not outdated else min(missing, room, 1 - starting)
        if most > 0:
            return [
                Start(seat=name, model=model, revision=desired.revision)
                for name in _free_names(model, taken, most)
            ]

    # one outdated group at a time, and only while the others carry the load without it
    if outdated and len(alive) == len(seats):
        spare = len(serving) - desired.count
        if spare >= 0 and (spare > 0 or desired.surge == 0 or desired.count == 0):
            first = min(outdated, key=lambda one: (one.load, one.name))
            why = (
                "it is drained"
                if _doomed(first, desired)
                else f"revision {desired.revision} replaces it"
            )
            return [Stop(seat=first.name, why=why)]
    return []


def _doomed(seat: GroupSeat, desired: DesiredModel) -> bool:
    return seat.name in desired.drained


def _free_names(model: str, taken: set[str], count: int) -> list[str]:
    names: list[str] = []
    index = 0
    while len(names) < count:
        name = f"{model}-{index}"
        if name not in taken:
            names.append(name)
        index += 1
    return names

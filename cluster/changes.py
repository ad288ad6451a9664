"""What to do next so that the groups that are become the groups that are wanted.

One state machine for up, scale, drain, rolling update, roll-back and replacement: a wish for each
model (settings by revision, a count), the slots there are, and a pure function from both to
actions. Sans-I/O: it is asked again whenever something has changed, and an action that was taken is
seen in the slots the next time.

A slot's phases:  starting ─▶ serving ─▶ stopping ─▶ (gone)
                     └── failed ────────────┘

Stopping includes draining: its streams end or move before its processes do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Of a slot."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is wanted of one model.

    Attributes:
        revision: of its settings; groups of another revision are to be replaced.
        count: groups.
        surge: groups beyond `count` that may be there while others are replaced. With 0 a group
            is stopped before its successor starts.
        drained: slots that are to stop whatever their revision.
        paused: start nothing more: the revision does not start.
    """

    revision: int
    count: int
    surge: int = 1
    drained: frozenset[str] = frozenset()
    paused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """The place of one group.

    Attributes:
        name: "smollm2-0".
        model: its model.
        revision: its settings'.
        phase: where it is.
        load: requests it runs; the least loaded one goes first.
    """

    name: str
    model: str
    revision: int
    phase: Phase
    load: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start a group of a revision in a new slot."""

    slot: str
    model: str
    revision: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """Drain the group of a slot, then end it."""

    slot: str
    why: str


Action = Start | Stop


def decide(wishes: Mapping[str, Wish], slots: Iterable[Slot]) -> list[Action]:
    """The next actions; none when all is as wanted or something must be waited for."""
    by_model: dict[str, list[Slot]] = {model: [] for model in wishes}
    actions: list[Action] = []
    for slot in slots:
        if slot.model in wishes:
            by_model[slot.model].append(slot)
        elif slot.phase is not Phase.STOPPING:
            actions.append(Stop(slot=slot.name, why="its model is no longer wanted"))
    for model, wish in wishes.items():
        actions += _decide(model, wish, by_model[model])
    return actions


def settled(wishes: Mapping[str, Wish], slots: Iterable[Slot]) -> bool:
    """Whether everything is as wanted."""
    slots = list(slots)
    if any(slot.phase is not Phase.SERVING or slot.model not in wishes for slot in slots):
        return False
    return all(
        [slot.revision for slot in slots if slot.model == model] == [wish.revision] * wish.count
        and not any(slot.name in wish.drained for slot in slots)
        for model, wish in wishes.items()
    )


def _decide(model: str, wish: Wish, slots: list[Slot]) -> list[Action]:
    alive = [slot for slot in slots if slot.phase is not Phase.STOPPING]
    current = [one for one in alive if one.revision == wish.revision and not _doomed(one, wish)]
    outdated = [one for one in alive if one not in current]
    serving = [one for one in alive if one.phase is Phase.SERVING]

    # too many of the right kind: scale down, all at once, those that start or idle first
    surplus = len(current) - wish.count
    if surplus > 0:
        current.sort(key=lambda one: (one.phase is Phase.SERVING, one.load, one.name))
        return [Stop(slot=one.name, why="fewer groups are wanted") for one in current[:surplus]]

    # what never served is no loss
    failed = [one for one in outdated if one.phase is not Phase.SERVING]
    if failed:
        return [Stop(slot=one.name, why="it was replaced") for one in failed]

    missing = wish.count - len(current)
    if missing > 0 and not wish.paused:
        room = wish.count + wish.surge - len(slots)
        starting = sum(one.phase is Phase.STARTING for one in current)
        # while there is something to replace, one group at a time; else all at once
        most = min(missing, room) if not outdated else min(missing, room, 1 - starting)
        if most > 0:
            return [
                Start(slot=name, model=model, revision=wish.revision)
                for name in _free_names(model, slots, most)
            ]

    # one outdated group at a time, and only while the others carry the load without it
    if outdated and len(alive) == len(slots):
        spare = len(serving) - wish.count
        if spare >= 0 and (spare > 0 or wish.surge == 0 or wish.count == 0):
            first = min(outdated, key=lambda one: (one.load, one.name))
            why = (
                "it is drained" if _doomed(first, wish) else f"revision {wish.revision} replaces it"
            )
            return [Stop(slot=first.name, why=why)]
    return []


def _doomed(slot: Slot, wish: Wish) -> bool:
    return slot.name in wish.drained


def _free_names(model: str, slots: list[Slot], count: int) -> list[str]:
    taken = {slot.name for slot in slots}
    names: list[str] = []
    index = 0
    while len(names) < count:
        name = f"{model}-{index}"
        if name not in taken:
            names.append(name)
        index += 1
    return names

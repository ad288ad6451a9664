"""What happened in a deployment: events, and the record of each failure with its first cause.

Sans-I/O; knows groups' places by name, and times. A *seat* is the place of one group in the
deployment ("smollm2-0"); each life of it is a group with an epoch of its own ("smollm2-0.3").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from arriero.shards.protocol.failure import FirstCause

KEEP_EVENTS = 512
KEEP_FAILURES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        at: seconds since 1970.
        kind: "serving", "lost", "draining", "gone", "failed", "change", …
        who: group, gateway or model concerned.
        text: in words.
    """

    at: float
    kind: str
    who: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a group or a gateway failed.

    Attributes:
        who: its id; "m-0.1 at gateway 1a2b3c4d" is a group that one gateway cannot use.
        kind: the error's class.
        cause: in words.
        at: seconds since 1970.
        seat: of the group.
        record: the first cause and what is folded under it, as `FirstCause.to_wire`.
        recovered_s: from the failure until the seat served again; None while it does not.
    """

    who: str
    kind: str
    cause: str
    at: float = 0.0
    seat: str = ""
    record: Mapping[str, Any] | None = None
    recovered_s: float | None = None

    def words(self) -> list[str]:
        """The failure as lines for people."""
        lines = [f"{self.who} failed: {self.cause}"]
        if self.record is not None:
            lines += [f"  {line}" for line in FirstCause.from_wire(self.record).words()]
        if self.recovered_s is not None:
            lines.append(
                f"  {'recovered:':<12}{self.seat} served again after {self.recovered_s:.1f} s"
            )
        return lines


class History:
    """The latest events and failures.

    Args:
        kept: what `to_wire` gave in an earlier life, or None.
    """

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        kept = kept or {}
        self._events = [Event(**one) for one in kept.get("events", ())]
        self._failures = [Failure(**one) for one in kept.get("failures", ())]

    def to_wire(self) -> dict[str, Any]:
        """As JSON can carry it."""
        return {
            "events": [asdict(one) for one in self._events],
            "failures": [asdict(one) for one in self._failures],
        }

    @property
    def events(self) -> tuple[Event, ...]:
        """Oldest first."""
        return tuple(self._events)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Oldest first."""
        return tuple(self._failures)

    def note(self, at: float, kind: str, who: str, text: str) -> None:
        """Keep an event."""
        self._events = [*self._events, Event(at=at, kind=kind, who=who, text=text)][-KEEP_EVENTS:]

    def failed(self, failure: Failure) -> bool:
        """Keep a failure; False when that group's is kept already: what follows is folded away."""
        if any(one.who == failure.who for one in self._failures):
            return False
        self._failures = [*self._failures, failure][-KEEP_FAILURES:]
        self.note(failure.at, "lost", failure.who, failure.cause)
        return True

    def serving(self, at: float, seat: str, group_id: str) -> None:
        """A group serves: what its seat failed with is over."""
        self.note(at, "serving", group_id, "serves")
        self._failures = [
            replace(one, recovered_s=at - one.at)
            if one.seat == seat and one.recovered_s is None and one.who != group_id
            else one
            for one in self._failures
        ]

    def why(self, name: str) -> Failure | None:
        """The latest failure of a group, a seat, a model or a gateway."""
        for one in reversed(self._failures):
            group = one.who.partition(" ")[0]  # "m-0.1 at gateway 1a2b3c4d" is of m-0.1
            if name in ("", one.who, group, one.seat, one.seat.rpartition("-")[0]):
                return one
        return None

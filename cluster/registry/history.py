"""Events of a deployment, and the record of each failure with its first cause.

Sans-I/O; knows names of seats and times. A *seat* is the place of a group in the deployment
("smollm2-0"); each new group in a seat has a new epoch ("smollm2-0.3").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from arriero.shards.protocol.failure import FirstCause

KEEP_EVENTS = 512
KEEP_FAILURES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """An event.

    Attributes:
        at: seconds since 1970.
        kind: "serving", "lost", "draining", "gone", "failed", "change", …
        who: id of the group, gateway or model.
        text: a sentence for people.
        by: name of the admin token that asked for the change; "" for nobody.
    """

    at: float
    kind: str
    who: str
    text: str
    by: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a group or a gateway failed.

    Attributes:
        who: id of the group or gateway; "m-0.1 at gateway 1a2b3c4d" is a group that the gateway
            cannot use.
        kind: class of the error.
        cause: a sentence for people.
        at: seconds since 1970.
        seat: of the group.
        record: the first cause with the evidence below the first cause; None for none.
        recovered_s: seconds from the failure until the seat served again; None until then.
    """

    who: str
    kind: str
    cause: str
    at: float = 0.0
    seat: str = ""
    record: FirstCause | None = None
    recovered_s: float | None = None

    def words(self) -> list[str]:
        """Lines for people."""
        lines = [f"{self.who} failed: {self.cause}"]
        if self.record is not None:
            lines += [f"  {line}" for line in self.record.words()]
        if self.recovered_s is not None:
            lines.append(
                f"  {'recovered:':<12}{self.seat} served again after {self.recovered_s:.1f} s"
            )
        return lines


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredHistory:
    """Events and failures, oldest first, as they outlive the registry's process."""

    events: tuple[Event, ...] = ()
    failures: tuple[Failure, ...] = ()


class History:
    """The latest events and failures.

    Args:
        stored: history from before a restart, or None.
    """

    def __init__(self, stored: StoredHistory | None = None) -> None:
        stored = stored or StoredHistory()
        self._events, self._failures = list(stored.events), list(stored.failures)

    @property
    def stored(self) -> StoredHistory:
        """The history as a value to store."""
        return StoredHistory(events=self.events, failures=self.failures)

    @property
    def events(self) -> tuple[Event, ...]:
        """Oldest first."""
        return tuple(self._events)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Oldest first."""
        return tuple(self._failures)

    def note(self, at: float, kind: str, who: str, text: str, by: str = "") -> None:
        """Store an event."""
        event = Event(at=at, kind=kind, who=who, text=text, by=by)
        self._events = [*self._events, event][-KEEP_EVENTS:]

    def failed(self, failure: Failure) -> bool:
        """Store a failure; False when a failure of this group is stored already."""
        if any(known.who == failure.who for known in self._failures):
            return False
        self._failures = [*self._failures, failure][-KEEP_FAILURES:]
        self.note(failure.at, "lost", failure.who, failure.cause)
        return True

    def serving(self, at: float, seat: str, group_id: str) -> None:
        """A group serves: earlier failures of the seat have recovered."""
        self.note(at, "serving", group_id, "serves")
        self._failures = [
            replace(failure, recovered_s=at - failure.at)
            if failure.seat == seat and failure.recovered_s is None and failure.who != group_id
            else failure
            for failure in self._failures
        ]

    def why(self, name: str) -> Failure | None:
        """The latest failure of a group, a seat, a model or a gateway."""
        for failure in reversed(self._failures):
            group = failure.who.partition(" ")[0]  # "m-0.1 at gateway 1a2b3c4d" is of m-0.1
            names = ("", failure.who, group, failure.seat, failure.seat.rpartition("-")[0])
            if name in names:
                return failure
        return None

"""Why a group was lost: evidence from many places, and the one piece of it that came first.

A dead slice shows up as its neighbours' broken collectives, its process's end, its silence and the
leader's unanswered plan, in any order. `RootCauseCollector` takes all of the evidence and names the
first cause; the rest is listed below the first cause. Knows evidence and times; knows nothing of
processes or sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any

SETTLE_S = 0.6
"""How long after the first piece of evidence the others are waited for."""
CAUSE_S = 0.9
"""As long, while all there is may follow from what has not been told yet."""
KEEP_FOLDED = 32
KEEP_LINES = 20
"""Log lines of a slice that are kept for the record."""


class Kind(IntEnum):
    """What a piece of evidence is, the most telling first.

    A slice that raised an error of its own ends its process next, so these two share a place and
    the earlier one counts. Broken-off waits are what the loss of another rank looks like.
    """

    CRASH = 0  # a process ended
    ERROR = 1  # a slice raised an error of its own
    SILENT = 2  # a process says nothing any more: stopped, or cut off
    STUCK = 3  # every slice waits, and nothing moves
    ABORTED = 4  # a wait for another rank broke off


_PLACE = {Kind.CRASH: 0, Kind.ERROR: 0, Kind.SILENT: 1, Kind.STUCK: 2, Kind.ABORTED: 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One thing that went wrong, as somebody saw it.

    Attributes:
        kind: what sort of thing.
        what: one sentence for people.
        rank: of the slice concerned; None for the leader or a node.
        node: address of its node.
        pid: its process; 0 when unknown.
        step: it was in; -1 when unknown.
        phase: of that step: "plan", "layers", "sample", …
        collective: the wait it was in; "" for none.
        exception: class and text; "" for none.
        log: the last lines that it logged.
        after_s: time since its last sign of life; how late the loss was seen.
    """

    kind: Kind
    what: str
    rank: int | None = None
    node: str = ""
    pid: int = 0
    step: int = -1
    phase: str = ""
    collective: str = ""
    exception: str = ""
    log: tuple[str, ...] = ()
    after_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstCause:
    """The record of one failure: its first cause, and what followed from it.

    Attributes:
        cause: the first cause.
        folded: what else was seen, in the order it was seen.
    """

    cause: Evidence
    folded: tuple[str, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """As msgpack and JSON can carry it."""
        wire = asdict(self)
        wire["cause"]["kind"] = self.cause.kind.name.lower()
        return wire

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> FirstCause:
        """Undo `to_wire`."""
        cause = dict(data["cause"])
        cause["kind"] = Kind[cause["kind"].upper()]
        cause["log"] = tuple(cause["log"])
        return cls(cause=Evidence(**cause), folded=tuple(data["folded"]))

    def words(self) -> list[str]:
        """The record as lines for people."""
        cause = self.cause
        told = [("what", cause.what), ("kind", cause.kind.name.lower())]
        if cause.rank is not None:
            told.append(("rank", str(cause.rank)))
        told += [("node", cause.node), ("pid", str(cause.pid or ""))]
        told += [("step", str(cause.step) if cause.step >= 0 else ""), ("phase", cause.phase)]
        told += [("collective", cause.collective), ("exception", cause.exception)]
        if cause.after_s:
            told.append(("seen", f"{cause.after_s:.1f} s after its last sign of life"))
        lines = [f"{name + ':':<12}{text}" for name, text in told if text]
        lines += [f"log:        {line}" for line in cause.log]
        lines += [f"then:       {line}" for line in self.folded]
        return lines


class RootCauseCollector:
    """Gathers evidence until it has settled."""

    def __init__(self) -> None:
        self._found: list[tuple[float, Evidence]] = []

    @property
    def begun(self) -> bool:
        """Whether there is any evidence."""
        return bool(self._found)

    def add(self, evidence: Evidence, now_s: float) -> None:
        """Take in a piece of evidence; of one kind about one slice, the first counts."""
        about = (evidence.kind, evidence.rank)
        if all((one.kind, one.rank) != about for _, one in self._found):
            self._found.append((now_s, evidence))

    def settled(self, now_s: float) -> bool:
        """Whether what belongs to the failure has had time to come in."""
        if not self.begun:
            return False
        limit_s = SETTLE_S if any(self._is_first_hand(one) for one in self._found) else CAUSE_S
        return now_s - self._found[0][0] >= limit_s

    def _is_first_hand(self, found: tuple[float, Evidence]) -> bool:
        """Whether it does not follow from something else: a wait for another that broke off."""
        at_s, one = found
        return one.kind is not Kind.ABORTED and not any(
            other.kind is Kind.ABORTED and other.rank == one.rank and before_s < at_s
            for before_s, other in self._found
        )

    def verdict(self) -> FirstCause:
        """The first cause as far as the evidence goes; there must be some."""
        assert self._found, "a verdict without evidence"
        # Errors of one's own and ended processes by time, before what follows from them: also the
        # end of a slice whose wait for another broke off before.
        order = sorted(
            self._found,
            key=lambda found: (_PLACE[found[1].kind], not self._is_first_hand(found), found[0]),
        )
        cause = order[0][1]
        folded = tuple(one.what for _, one in self._found if one is not cause)
        same = [one for _, one in self._found if one.rank == cause.rank and one is not cause]
        for other in same:  # where it was is often known from another piece
            cause = replace(
                cause,
                node=cause.node or other.node,
                pid=cause.pid or other.pid,
                step=cause.step if cause.step >= 0 else other.step,
                phase=cause.phase or other.phase,
                log=cause.log or other.log,
            )
        return FirstCause(cause=cause, folded=folded[:KEEP_FOLDED])

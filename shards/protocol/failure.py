"""Why a group was lost: evidence from many places, and the evidence of the first cause.

A dead slice shows up as broken collectives of its neighbours, the end of its process, missing
heartbeats and an unanswered plan at the leader, in any order. `RootCauseCollector` takes all of
the evidence and names the first cause; the rest is listed below the first cause. Knows evidence and
times; knows nothing of processes or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

SETTLE_S = 0.6
"""Seconds of waiting for more evidence after the first piece."""
CAUSE_S = 0.9
"""Same, while all evidence may be the consequence of a cause that is not reported yet."""
KEEP_FOLDED = 32
KEEP_LINES = 20
"""Log lines of a slice kept for the record."""


class Kind(StrEnum):
    """Kind of a piece of evidence; the first kind is closest to the first cause.

    A slice that raised an error of its own ends its process next: both kinds have the same rank in
    `_ORDER`, and the earlier evidence counts. ABORTED is the usual consequence of losing another
    rank.
    """

    CRASH = "crash"  # a process ended
    ERROR = "error"  # a slice raised an error of its own
    SILENT = "silent"  # a process sends no heartbeat any more: stopped, or cut off
    STUCK = "stuck"  # every slice waits, and none makes progress
    ABORTED = "aborted"  # a wait for another rank broke off


_ORDER = {Kind.CRASH: 0, Kind.ERROR: 0, Kind.SILENT: 1, Kind.STUCK: 2, Kind.ABORTED: 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One observed sign of a failure.

    Attributes:
        kind: kind of the sign.
        summary: one sentence for people.
        rank: rank of the slice concerned; None for the leader or a node.
        node: address of the slice's node.
        pid: process of the slice; 0 when unknown.
        step: step of the slice; -1 when unknown.
        phase: phase of that step: "plan", "layers", "sample", …
        collective: collective that the slice waited in; "" for none.
        exception: class and text of the exception; "" for none.
        log: last lines logged by the slice.
        after_s: seconds since the last sign of life, so the delay of the detection.
    """

    kind: Kind
    summary: str
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
    """The record of one failure: its first cause and the consequences.

    Attributes:
        cause: the first cause.
        folded: summaries of all other evidence, in the order of arrival.
    """

    cause: Evidence
    folded: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """The record as lines for people."""
        cause = self.cause
        rows = [("cause", cause.summary), ("kind", cause.kind.value)]
        if cause.rank is not None:
            rows.append(("rank", str(cause.rank)))
        rows += [("node", cause.node), ("pid", str(cause.pid or ""))]
        rows += [("step", str(cause.step) if cause.step >= 0 else ""), ("phase", cause.phase)]
        rows += [("collective", cause.collective), ("exception", cause.exception)]
        if cause.after_s:
            rows.append(("detected", f"{cause.after_s:.1f} s after the last sign of life"))
        lines = [f"{name + ':':<12}{text}" for name, text in rows if text]
        lines += [f"log:        {line}" for line in cause.log]
        lines += [f"then:       {line}" for line in self.folded]
        return lines


@dataclass(frozen=True, slots=True)
class _TimedEvidence:
    at_s: float
    evidence: Evidence


class RootCauseCollector:
    """Gathers evidence until the evidence has settled, then names the first cause."""

    def __init__(self) -> None:
        self._entries: list[_TimedEvidence] = []

    @property
    def has_evidence(self) -> bool:
        """Whether there is any evidence."""
        return bool(self._entries)

    def add(self, evidence: Evidence, now_s: float) -> None:
        """Add a piece of evidence; for each kind and slice, only the first piece counts."""
        key = (evidence.kind, evidence.rank)
        if all((entry.evidence.kind, entry.evidence.rank) != key for entry in self._entries):
            self._entries.append(_TimedEvidence(now_s, evidence))

    def settled(self, now_s: float) -> bool:
        """Whether evidence of the same failure has had time to arrive."""
        if not self._entries:
            return False
        limit_s = SETTLE_S if any(self._is_independent(e) for e in self._entries) else CAUSE_S
        return now_s - self._entries[0].at_s >= limit_s

    def _is_independent(self, entry: _TimedEvidence) -> bool:
        """Whether the evidence is no consequence of a broken wait for another rank."""
        return entry.evidence.kind is not Kind.ABORTED and not any(
            other.evidence.kind is Kind.ABORTED
            and other.evidence.rank == entry.evidence.rank
            and other.at_s < entry.at_s
            for other in self._entries
        )

    def first_cause(self) -> FirstCause:
        """The first cause according to the evidence so far; there must be some evidence."""
        assert self._entries, "no evidence, so no first cause"
        # A slice's own error and the end of a process sort by time. Consequences come after both:
        # also the end of a slice whose wait for another rank broke off before.
        cause = min(
            self._entries,
            key=lambda e: (_ORDER[e.evidence.kind], not self._is_independent(e), e.at_s),
        ).evidence
        others = [entry.evidence for entry in self._entries if entry.evidence is not cause]
        folded = tuple(other.summary for other in others)
        rank = cause.rank
        for other in others:
            if other.rank != rank:
                continue
            cause = replace(  # other evidence about the slice often knows more of its position
                cause,
                node=cause.node or other.node,
                pid=cause.pid or other.pid,
                step=cause.step if cause.step >= 0 else other.step,
                phase=cause.phase or other.phase,
                log=cause.log or other.log,
            )
        return FirstCause(cause=cause, folded=folded[:KEEP_FOLDED])

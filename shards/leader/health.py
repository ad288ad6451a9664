"""Health of a group's slices: a decision from heartbeats and plans.

Each slice sends a heartbeat twice a second, from a thread of its own, with the state of the main
thread. The decision separates three states: a silent process (stopped, or cut off), a group in
which every slice waits and none makes progress (a lost message, a deadlock), and a slice that
computes (a long prefill), which is healthy. A heartbeat counts from the time of sending, so a link
that delivers every heartbeat late counts as silence too. Sans-I/O: takes heartbeats, plans and a
clock; returns evidence.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from arriero.shards.protocol.failure import KEEP_LINES, Evidence, Kind
from arriero.shards.protocol.heartbeat import HEARTBEAT_PERIOD_S, Heartbeat

_CLOCK_DRIFT = 1e-3
"""Largest drift between the clocks of two machines, in seconds per second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthLimits:
    """Time limits after which a group counts as lost.

    Attributes:
        silence_s: seconds without a heartbeat of a slice, or by which the heartbeats are late.
        hang_s: seconds with a plan outstanding, every slice waiting, and no progress.
        step_s: seconds with a plan outstanding and a slice, or its device, computing without
            progress.
    """

    silence_s: float = 3.0
    hang_s: float = 4.0
    step_s: float = 600.0


@dataclass(slots=True)
class _SliceHealth:
    sent_s: float  # when the last heartbeat was sent, on our clock
    progress_s: float  # when the last heartbeat with progress was sent
    arrived_s: float  # when the last heartbeat arrived
    offset_s: float = math.inf  # our clock minus the slice's, plus the shortest time on the link
    heartbeat: Heartbeat | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEEP_LINES))


class GroupHealth:
    """Decides whether one group is healthy.

    Args:
        limits: time limits.
        names: name of each slice for people, by rank.
        now_s: current time.
    """

    def __init__(self, limits: HealthLimits, names: list[str], now_s: float) -> None:
        self.limits, self._names = limits, names
        self._slices = [_SliceHealth(now_s, now_s, now_s) for _ in names]
        self._checked_s = now_s
        self._plans: dict[tuple[int, int], float] = {}  # time of sending by (step, dp_rank)

    def restart(self, now_s: float) -> None:
        """Forget all silence so far."""
        self._checked_s = now_s
        for state in self._slices:
            state.sent_s = state.progress_s = state.arrived_s = now_s
            state.offset_s = math.inf

    def beat(self, rank: int, heartbeat: Heartbeat, now_s: float) -> None:
        """Add a heartbeat."""
        state = self._slices[rank]
        drift_s = (now_s - state.arrived_s) * _CLOCK_DRIFT
        state.offset_s = min(state.offset_s + drift_s, now_s - heartbeat.at_s)
        state.arrived_s = now_s
        sent_s = heartbeat.at_s + state.offset_s
        state.sent_s = max(state.sent_s, sent_s)
        last = state.heartbeat
        if last is None or (last.step, last.progress, last.phase) != (
            heartbeat.step,
            heartbeat.progress,
            heartbeat.phase,
        ):
            state.progress_s = max(state.progress_s, sent_s)
        state.heartbeat = heartbeat
        state.lines.extend(heartbeat.log)

    def plan_sent(self, step: int, now_s: float, dp_rank: int = 0) -> None:
        """Note that a plan of a data-parallel rank was sent."""
        self._plans[step, dp_rank] = now_s

    def result_received(self, step: int, dp_rank: int = 0) -> None:
        """Note that the result of a plan has arrived."""
        self._plans.pop((step, dp_rank), None)

    def describe(self, rank: int, kind: Kind, summary: str, now_s: float) -> Evidence:
        """Evidence about a slice, filled from the slice's heartbeats."""
        return self._evidence(kind, rank, summary, now_s - self._slices[rank].sent_s)

    def check(self, now_s: float) -> Evidence | None:
        """Evidence of a failure, if any; call several times a second."""
        paused_s = now_s - self._checked_s - 2 * HEARTBEAT_PERIOD_S
        self._checked_s = now_s
        if paused_s > 0:  # this process was stopped: no slice was silent
            for state in self._slices:
                state.sent_s += paused_s
                state.progress_s += paused_s
                state.offset_s += paused_s  # heartbeats of that time are late because of the pause
            self._plans = {plan: at_s + paused_s for plan, at_s in self._plans.items()}
        return self._find_silent(now_s) or self._find_stuck(now_s)

    def _find_silent(self, now_s: float) -> Evidence | None:
        rank = min(range(len(self._slices)), key=lambda rank: self._slices[rank].sent_s)
        silent_s = now_s - self._slices[rank].sent_s
        if silent_s < self.limits.silence_s:
            return None
        late_s = silent_s - (now_s - self._slices[rank].arrived_s)
        summary = f"{self._names[rank]} has been silent for {silent_s:.1f} s"
        if late_s > HEARTBEAT_PERIOD_S:
            summary += (
                f"; its heartbeats come {late_s:.1f} s late: a link that loses or delays packets"
            )
        else:
            summary += ": stopped, or cut off"
        return self._evidence(Kind.SILENT, rank, summary, silent_s)

    def _find_stuck(self, now_s: float) -> Evidence | None:
        if not self._plans:
            return None
        oldest = min(self._plans)
        age_s = now_s - self._plans[oldest]
        still_s = min(age_s, now_s - max(self._progress_s(state) for state in self._slices))
        computing = any(
            state.heartbeat is not None and state.heartbeat.computes for state in self._slices
        )
        if still_s < (self.limits.step_s if computing else self.limits.hang_s):
            return None
        # the slice with the least progress delays the others
        rank = min(range(len(self._slices)), key=self._progress)
        heartbeat = self._slices[rank].heartbeat
        if heartbeat is not None and heartbeat.waits_for:
            where = f"waiting for {heartbeat.waits_for}"
        elif heartbeat is None or heartbeat.idle:
            where = f"waiting for the plan of step {oldest[0]}"
        else:
            where = f"in {heartbeat.phase}"
        summary = (
            f"{self._names[rank]} made no progress for {still_s:.1f} s, {where}; nor did the others"
        )
        return self._evidence(Kind.STUCK, rank, summary, still_s)

    def _progress_s(self, state: _SliceHealth) -> float:
        # an idle slice makes no progress because there is no work, which counts as waiting
        if state.heartbeat is not None and state.heartbeat.idle:
            return 0.0
        return state.progress_s

    def _progress(self, rank: int) -> tuple[int, int]:
        heartbeat = self._slices[rank].heartbeat
        return (-1, 0) if heartbeat is None else (heartbeat.step, heartbeat.progress)

    def _evidence(self, kind: Kind, rank: int, summary: str, after_s: float) -> Evidence:
        heartbeat = self._slices[rank].heartbeat
        if heartbeat is None or heartbeat.step < 0:  # no heartbeat since loading
            heartbeat = Heartbeat(step=-1, phase="")
        return Evidence(
            kind=kind,
            summary=summary,
            rank=rank,
            step=max(heartbeat.step, min(self._plans, default=(-1, 0))[0]),
            phase=heartbeat.phase,
            collective=heartbeat.waits_for,
            log=tuple(self._slices[rank].lines),
            after_s=after_s,
        )

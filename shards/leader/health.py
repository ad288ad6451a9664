"""Whether the slices of a group are alive and get on: a decision over pulses and plans.

Each slice sends a pulse twice a second from a thread of its own, which says what its main thread
does. Three things are told apart: a process that is silent (stopped, cut off), a group in which
everybody waits and nothing moves (a lost message, a deadlock), and a slice that computes (a long
prefill), which is let be. A pulse counts from when it was sent, so that a link which delivers each
of them, but late, is silence too. Sans-I/O: takes pulses, plans and a clock; gives evidence.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from arriero.shards.protocol.failure import KEEP_LINES, Evidence, Kind
from arriero.shards.protocol.heartbeat import HEARTBEAT_PERIOD_S, Heartbeat

_CLOCK_DRIFT = 1e-3
"""Seconds a second by which two machines' clocks part at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthLimits:
    """How long is too long.

    Attributes:
        silence_s: without a pulse of a slice, or with pulses that are that late.
        hang_s: with a plan outstanding, every slice waiting, and nothing moving.
        step_s: with a plan outstanding and some slice, or its device, computing all the while.
    """

    silence_s: float = 3.0
    hang_s: float = 4.0
    step_s: float = 600.0


@dataclass(slots=True)
class _Seen:
    heard_s: float  # when the last pulse was sent
    moved_s: float
    arrived_s: float  # when the last pulse came
    ahead_s: float = math.inf  # our clock is of the slice's, and the quickest way takes
    pulse: Heartbeat | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEEP_LINES))


class GroupHealth:
    """Judges one group.

    Args:
        limits: how long is too long.
        names: how to call each slice, by rank.
        now_s: the clock.
    """

    def __init__(self, limits: HealthLimits, names: list[str], now_s: float) -> None:
        self.limits, self._names = limits, names
        self._slices = [_Seen(now_s, now_s, now_s) for _ in names]
        self._checked_s = now_s
        self._plans: dict[tuple[int, int], float] = {}  # by step and lane

    def restart(self, now_s: float) -> None:
        """Forget how long anybody has been silent."""
        self._checked_s = now_s
        for seen in self._slices:
            seen.heard_s = seen.moved_s = seen.arrived_s = now_s
            seen.ahead_s = math.inf

    def beat(self, rank: int, pulse: Heartbeat, now_s: float) -> None:
        """Take in a pulse."""
        seen = self._slices[rank]
        drift_s = (now_s - seen.arrived_s) * _CLOCK_DRIFT
        seen.ahead_s = min(seen.ahead_s + drift_s, now_s - pulse.at_s)
        seen.arrived_s = now_s
        sent_s = pulse.at_s + seen.ahead_s
        seen.heard_s = max(seen.heard_s, sent_s)
        before = seen.pulse
        if before is None or (before.step, before.moves, before.phase) != (
            pulse.step,
            pulse.moves,
            pulse.phase,
        ):
            seen.moved_s = max(seen.moved_s, sent_s)
        seen.pulse = pulse
        seen.lines.extend(pulse.log)

    def planned(self, step: int, now_s: float, dp_rank: int = 0) -> None:
        """A lane's plan went out."""
        self._plans[step, dp_rank] = now_s

    def answered(self, step: int, dp_rank: int = 0) -> None:
        """A plan's result is in."""
        self._plans.pop((step, dp_rank), None)

    def describe(self, rank: int, kind: Kind, what: str, now_s: float) -> Evidence:
        """Evidence about a slice, with all that its pulses told."""
        return self._evidence(kind, rank, what, now_s - self._slices[rank].heard_s)

    def check(self, now_s: float) -> Evidence | None:
        """What is wrong, if anything is; to be asked several times a second."""
        paused_s = now_s - self._checked_s - 2 * HEARTBEAT_PERIOD_S
        self._checked_s = now_s
        if paused_s > 0:  # we were stopped ourselves: nobody was silent, we did not listen
            for seen in self._slices:
                seen.heard_s += paused_s
                seen.moved_s += paused_s
                seen.ahead_s += paused_s  # what came meanwhile is late through us
            self._plans = {plan: at_s + paused_s for plan, at_s in self._plans.items()}
        return self._silent(now_s) or self._stuck(now_s)

    def _silent(self, now_s: float) -> Evidence | None:
        rank = min(range(len(self._slices)), key=lambda one: self._slices[one].heard_s)
        silent_s = now_s - self._slices[rank].heard_s
        if silent_s < self.limits.silence_s:
            return None
        late_s = silent_s - (now_s - self._slices[rank].arrived_s)
        if late_s > HEARTBEAT_PERIOD_S:
            told = f"pulses come {late_s:.1f} s late: a link that loses or delays packets"
            what = f"{self._names[rank]} has been silent for {silent_s:.1f} s; its {told}"
        else:
            what = f"{self._names[rank]} has been silent for {silent_s:.1f} s: stopped, or cut off"
        return self._evidence(Kind.SILENT, rank, what, silent_s)

    def _stuck(self, now_s: float) -> Evidence | None:
        if not self._plans:
            return None
        oldest = min(self._plans)
        age_s = now_s - self._plans[oldest]
        still_s = min(age_s, now_s - max(self._moved_s(one) for one in self._slices))
        computing = any(seen.pulse is not None and seen.pulse.computes for seen in self._slices)
        if still_s < (self.limits.step_s if computing else self.limits.hang_s):
            return None
        # whoever got least far holds up the others
        rank = min(range(len(self._slices)), key=self._progress)
        pulse = self._slices[rank].pulse
        if pulse is not None and pulse.waits_for:
            where = f"waiting for {pulse.waits_for}"
        elif pulse is None or pulse.idle:
            where = f"waiting for the plan of step {oldest[0]}"
        else:
            where = f"in {pulse.phase}"
        what = (
            f"{self._names[rank]} got no further for {still_s:.1f} s, {where}; nor did the others"
        )
        return self._evidence(Kind.STUCK, rank, what, still_s)

    def _moved_s(self, seen: _Seen) -> float:
        # an idle slice gets no further because it has nothing to do, which counts as waiting
        if seen.pulse is not None and seen.pulse.idle:
            return 0.0
        return seen.moved_s

    def _progress(self, rank: int) -> tuple[int, int]:
        pulse = self._slices[rank].pulse
        return (-1, 0) if pulse is None else (pulse.step, pulse.moves)

    def _evidence(self, kind: Kind, rank: int, what: str, after_s: float) -> Evidence:
        pulse = self._slices[rank].pulse
        if pulse is None or pulse.step < 0:  # it said nothing since it was loaded
            pulse = Heartbeat(step=-1, phase="")
        return Evidence(
            kind=kind,
            what=what,
            rank=rank,
            step=max(pulse.step, min(self._plans, default=(-1, 0))[0]),
            phase=pulse.phase,
            collective=pulse.waits_for,
            log=tuple(self._slices[rank].lines),
            after_s=after_s,
        )

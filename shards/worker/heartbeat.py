"""The heartbeats of a slice: twice a second, a separate thread sends the main thread's state.

A main thread that hangs in a collective cannot report the hang; heartbeats that name the collective
and show no progress tell a hang from a crash. A heartbeat contains the new log lines, so that the
leader has the last lines of a lost process. Knows the main thread's state and the socket; knows
nothing of the leader's limits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from arriero.shards.protocol import wire
from arriero.shards.protocol.failure import KEEP_LINES
from arriero.shards.protocol.heartbeat import HEARTBEAT_PERIOD_S, Heartbeat

if TYPE_CHECKING:
    from arriero.shards.protocol.rendezvous import LeaderEndpoint
    from arriero.shards.worker.runner import Runner

MAX_LINE = 300


@dataclass(slots=True)
class Activity:
    """State of the main thread; only the main thread writes it.

    Attributes:
        phase: phase of the start, before there is a runner.
        runner: the runner, source of step and phase; None during the start.
        idle: the main thread waits for a plan.
    """

    phase: str = "start"
    runner: Runner | None = None
    idle: bool = False

    def now(self, log: tuple[str, ...] = ()) -> Heartbeat:
        """The heartbeat of this moment, with new log lines."""
        if self.runner is None:
            return Heartbeat(step=-1, phase=self.phase, at_s=time.monotonic(), log=log)
        watchdog = self.runner.mesh.watchdog
        return Heartbeat(
            step=watchdog.step,
            phase=self.runner.phase,
            waits_for=watchdog.waits_for,
            idle=self.idle,
            progress=watchdog.progress,
            at_s=time.monotonic(),
            log=log,
            on_device=watchdog.on_device,
        )


class HeartbeatSender:
    """Sends heartbeats until closed.

    Args:
        rank: rank of the slice.
        endpoint: endpoint of the group's leader.
        activity: state of the main thread.
    """

    def __init__(self, rank: int, endpoint: LeaderEndpoint, activity: Activity) -> None:
        self._rank, self._endpoint, self._activity = rank, endpoint, activity
        self._lines = _RecentLines()
        logging.getLogger().addHandler(self._lines)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def tail(self) -> tuple[str, ...]:
        """The last log lines."""
        return tuple(self._lines.last)

    def close(self) -> None:
        """Stop; safe to call twice."""
        self._closed.set()
        self._thread.join()
        logging.getLogger().removeHandler(self._lines)

    def _run(self) -> None:
        context = zmq.Context()
        sender = context.socket(zmq.PUSH)
        sender.setsockopt(zmq.LINGER, 0)
        sender.setsockopt(zmq.SNDHWM, 8)
        self._endpoint.secure(sender)
        sender.connect(self._endpoint.heartbeat_address)
        try:
            while True:
                heartbeat = self._activity.now(self._lines.take_new())
                with contextlib.suppress(zmq.Again):  # a lost leader does not read
                    sender.send(wire.encode((self._rank, heartbeat)), zmq.NOBLOCK)
                if self._closed.wait(HEARTBEAT_PERIOD_S):
                    return
        finally:
            sender.close()
            context.term()


class _RecentLines(logging.Handler):
    """The last log lines of this process."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.last: deque[str] = deque(maxlen=KEEP_LINES)
        self._new: deque[str] = deque(maxlen=KEEP_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).strip().splitlines()[-1][:MAX_LINE]
        self.last.append(line)
        self._new.append(line)

    def take_new(self) -> tuple[str, ...]:
        """The lines since the last call."""
        lines = []
        while self._new:
            lines.append(self._new.popleft())
        return tuple(lines)

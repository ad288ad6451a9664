"""A slice's pulse: twice a second, from a thread of its own, what the main thread is doing.

The main thread may be stuck in a collective, and then cannot say so itself; that it says nothing,
and the pulse says where it waits, is how a hang is told from a crash. Carries the last log lines
along, so that they are with the leader when the process is gone.
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

from arriero.shards.protocol.failure import KEEP_LINES
from arriero.shards.protocol.heartbeat import HEARTBEAT_PERIOD_S, Heartbeat, pack

if TYPE_CHECKING:
    from arriero.shards.protocol.rendezvous import LeaderEndpoint
    from arriero.shards.worker.runner import Runner

MAX_LINE = 300


@dataclass(slots=True)
class Activity:
    """Where the main thread is; written by it alone.

    Attributes:
        phase: while there is no runner.
        runner: says more, once it is there.
        idle: it waits for a plan.
    """

    phase: str = "start"
    runner: Runner | None = None
    idle: bool = False

    def now(self, log: tuple[str, ...] = ()) -> Heartbeat:
        """As a pulse says it."""
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
    """Sends pulses until closed.

    Args:
        rank: of the slice.
        ticket: of its group.
        activity: of the main thread.
    """

    def __init__(self, rank: int, ticket: LeaderEndpoint, activity: Activity) -> None:
        self._rank, self._ticket, self._activity = rank, ticket, activity
        self._lines = _Lines()
        logging.getLogger().addHandler(self._lines)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def tail(self) -> list[str]:
        """The last lines logged."""
        return list(self._lines.all)

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
        self._ticket.secure(sender)
        sender.connect(self._ticket.heartbeat_address)
        try:
            while True:
                with contextlib.suppress(
                    zmq.Again
                ):  # the leader does not read: it is gone, or will
                    sender.send(
                        pack(self._rank, self._activity.now(self._lines.fresh())), zmq.NOBLOCK
                    )
                if self._closed.wait(HEARTBEAT_PERIOD_S):
                    return
        finally:
            sender.close()
            context.term()


class _Lines(logging.Handler):
    """Keeps the last lines logged by this process."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.all: deque[str] = deque(maxlen=KEEP_LINES)
        self._fresh: deque[str] = deque(maxlen=KEEP_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).strip().splitlines()[-1][:MAX_LINE]
        self.all.append(line)
        self._fresh.append(line)

    def fresh(self) -> tuple[str, ...]:
        """What came since the last time."""
        lines = []
        while self._fresh:
            lines.append(self._fresh.popleft())
        return tuple(lines)

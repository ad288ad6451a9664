"""The leader's watch over its slices: a thread that takes heartbeats and gathers evidence.

Runs beside the engine, so that a loss is detected also while no step runs. Knows the heartbeat
socket and the clock; `health` decides what is wrong, and `failure` decides the first cause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import zmq

from arriero.shards.errors import WireError
from arriero.shards.leader.health import GroupHealth, HealthLimits
from arriero.shards.protocol import wire
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind, RootCauseCollector
from arriero.shards.protocol.heartbeat import Heartbeat
from arriero.shards.protocol.messages import SliceFailure, SliceHello

log = logging.getLogger(__name__)

CHECK_S = 0.2


class Monitor:
    """Watches the slices of one group.

    Args:
        socket: socket of the heartbeats; closed with the monitor.
        num_slices: slices of the group.
        limits: time limits.
        on_evidence: callback with each piece of evidence, from any thread.

    Attributes:
        find_lost: returns evidence of a lost slice, if any; called several times a second.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        num_slices: int,
        limits: HealthLimits,
        on_evidence: Callable[[Evidence], None],
    ) -> None:
        self.find_lost: Callable[[], Evidence | None] = lambda: None
        self._socket, self._on_evidence = socket, on_evidence
        self._lock = threading.Lock()
        # Guarded by `_lock`:
        self._names = [f"slice {rank}" for rank in range(num_slices)]
        self._hellos: list[SliceHello | None] = [None] * num_slices
        self._health = GroupHealth(limits, self._names, time.monotonic())
        self._collector = RootCauseCollector()
        self._judging = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()

    def name(self, rank: int, hello: SliceHello) -> None:
        """Set a slice's name for people, and its host and process."""
        with self._lock:
            self._names[rank] = f"slice {rank} (pid {hello.pid} on {hello.host})"
            self._hellos[rank] = hello

    def set_limits(self, limits: HealthLimits) -> None:
        """Replace the time limits from now on."""
        with self._lock:
            self._health.limits = limits

    def judge(self) -> None:
        """Judge silence from now on: every slice has loaded."""
        with self._lock:
            self._health.restart(time.monotonic())
            self._judging = True

    def suspend(self) -> None:
        """Judge no silence until the next `judge`: slices that load weights may be silent."""
        with self._lock:
            self._judging = False

    def plan_sent(self, step: int, dp_rank: int) -> None:
        """Note that a plan of a data-parallel rank is sent."""
        with self._lock:
            self._health.plan_sent(step, time.monotonic(), dp_rank)

    def result_received(self, step: int, dp_rank: int) -> None:
        """Note that the result of a plan has arrived."""
        with self._lock:
            self._health.result_received(step, dp_rank)

    def report_error(self, rank: int, failure: SliceFailure) -> None:
        """Add the error that a slice reports in its last message."""
        evidence = Evidence(
            kind=Kind.ABORTED if failure.collective else Kind.ERROR,
            summary=f"slice {rank} failed in {failure.phase}: {failure.error}",
            rank=rank,
            step=failure.step,
            phase=failure.phase,
            collective=failure.collective,
            exception=failure.error,
            log=(*failure.log, *failure.at.strip().splitlines()),
        )
        self.report(evidence)

    def report_slice(self, rank: int, kind: Kind, summary: str) -> None:
        """Add evidence about a slice, filled from the slice's heartbeats."""
        with self._lock:
            evidence = self._health.describe(rank, kind, summary, time.monotonic())
        self.report(evidence)

    def report(self, evidence: Evidence) -> None:
        """Add evidence, filled from the slice's hello and heartbeats."""
        with self._lock:
            if self._closing.is_set():
                return
            now_s = time.monotonic()
            rank = evidence.rank
            if rank is not None:
                known = self._health.describe(rank, evidence.kind, evidence.summary, now_s)
                hello = self._hellos[rank]
                evidence = replace(
                    evidence,
                    node=evidence.node or (hello.host if hello else ""),
                    pid=evidence.pid or (hello.pid if hello else 0),
                    step=evidence.step if evidence.step >= 0 else known.step,
                    phase=evidence.phase or known.phase,
                    collective=evidence.collective or known.collective,
                    log=evidence.log or known.log,
                    after_s=evidence.after_s or known.after_s,
                )
            self._collector.add(evidence, now_s)
        self._on_evidence(evidence)

    @property
    def settling(self) -> bool:
        """Whether there is evidence, and more evidence may still arrive."""
        with self._lock:
            collector = self._collector
            return collector.has_evidence and not collector.settled(time.monotonic())

    def first_cause(self) -> FirstCause | None:
        """The first cause, once the evidence has settled; None without evidence."""
        while self.settling:
            time.sleep(CHECK_S / 4)
        with self._lock:
            return self._collector.first_cause() if self._collector.has_evidence else None

    def close(self) -> None:
        """Stop; later evidence is a consequence of the stop and is ignored."""
        with self._lock:
            self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                if self._socket.poll(int(CHECK_S * 1000)):
                    self._take_heartbeat(self._socket.recv())
                if (evidence := self._check()) is not None:
                    self.report(evidence)
        finally:
            self._socket.close()

    def _take_heartbeat(self, message: bytes) -> None:
        try:
            rank, heartbeat = wire.decode(message, tuple[int, Heartbeat])
        except WireError as error:  # the slice counts as silent
            log.error("a heartbeat: %s", error)
            return
        with self._lock:
            self._health.beat(rank, heartbeat, time.monotonic())

    def _check(self) -> Evidence | None:
        if (evidence := self.find_lost()) is not None:
            return evidence
        with self._lock:
            return self._health.check(time.monotonic()) if self._judging else None

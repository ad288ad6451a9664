"""The leader's ear for its slices: a thread that hears pulses and gathers evidence of a loss.

Runs beside the engine, so that a loss is found also while nothing is computed. Knows the socket of
the pulses, and the clock; what is wrong `health` decides, and what came first `failure`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import zmq

from arriero.shards.leader.health import GroupHealth, HealthLimits
from arriero.shards.protocol import heartbeat as pulse
from arriero.shards.protocol.failure import Evidence, FirstCause, Kind, RootCauseCollector

CHECK_S = 0.2


class Monitor:
    """Watches the slices of one group.

    Args:
        pulses: the socket they come by; closed with the monitor.
        num_slices: of the group.
        limits: how long is too long.
        on_evidence: called with each piece of evidence, from whichever thread found it.

    Attributes:
        watch: asked several times a second whether a slice is lost.
    """

    def __init__(
        self,
        pulses: zmq.Socket[bytes],
        num_slices: int,
        limits: HealthLimits,
        on_evidence: Callable[[Evidence], None],
    ) -> None:
        self.watch: Callable[[], Evidence | None] = lambda: None
        self._pulses, self._on_evidence = pulses, on_evidence
        self._lock = threading.Lock()
        # Guarded by `_lock`:
        self._names = [f"slice {rank}" for rank in range(num_slices)]
        self._places: list[dict[str, Any]] = [{} for _ in self._names]
        self._health = GroupHealth(limits, self._names, time.monotonic())
        self._inquest = RootCauseCollector()
        self._judging = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()

    def name(self, rank: int, words: str, hello: dict[str, Any]) -> None:
        """Say how to call a slice, and where it is: its hello's `host` and `pid`."""
        with self._lock:
            self._names[rank], self._places[rank] = words, hello

    def set_limits(self, limits: HealthLimits) -> None:
        """Judge by other limits from now on."""
        with self._lock:
            self._health.limits = limits

    def judge(self) -> None:
        """Judge silence from now on: every slice has loaded."""
        with self._lock:
            self._health.restart(time.monotonic())
            self._judging = True

    def planned(self, step: int, dp_rank: int) -> None:
        """A lane's plan goes out."""
        with self._lock:
            self._health.planned(step, time.monotonic(), dp_rank)

    def answered(self, step: int, dp_rank: int) -> None:
        """A plan's result is in."""
        with self._lock:
            self._health.answered(step, dp_rank)

    def raised(self, rank: int, body: dict[str, Any]) -> None:
        """A slice reports its error."""
        collective = body["collective"]
        evidence = Evidence(
            kind=Kind.ABORTED if collective else Kind.ERROR,
            what=f"slice {rank} failed in {body['phase']}: {body['error']}",
            rank=rank,
            step=body["step"],
            phase=body["phase"],
            collective=collective,
            exception=body["error"],
            log=(*body["log"], *body["at"].strip().splitlines()),
        )
        self.report(evidence)

    def report_slice(self, rank: int, kind: Kind, what: str) -> None:
        """Evidence about a slice, with what its pulses told of it."""
        with self._lock:
            evidence = self._health.describe(rank, kind, what, time.monotonic())
        self.report(evidence)

    def report(self, evidence: Evidence) -> None:
        """Take evidence in; what is known of the slice besides is added."""
        with self._lock:
            if self._closing.is_set():
                return
            now_s = time.monotonic()
            rank = evidence.rank
            if rank is not None:
                known = self._health.describe(rank, evidence.kind, evidence.what, now_s)
                place = self._places[rank]
                evidence = replace(
                    evidence,
                    node=evidence.node or place.get("host", ""),
                    pid=evidence.pid or place.get("pid", 0),
                    step=evidence.step if evidence.step >= 0 else known.step,
                    phase=evidence.phase or known.phase,
                    collective=evidence.collective or known.collective,
                    log=evidence.log or known.log,
                    after_s=evidence.after_s or known.after_s,
                )
            self._inquest.add(evidence, now_s)
        self._on_evidence(evidence)

    @property
    def settling(self) -> bool:
        """Whether there is evidence, and more of it may still come in."""
        with self._lock:
            return self._inquest.begun and not self._inquest.settled(time.monotonic())

    def verdict(self) -> FirstCause | None:
        """The first cause, once the evidence has settled; None when there is none."""
        while self.settling:
            time.sleep(CHECK_S / 4)
        with self._lock:
            return self._inquest.verdict() if self._inquest.begun else None

    def close(self) -> None:
        """Stop; evidence that comes later is the consequence of that, and left out."""
        with self._lock:
            self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                if self._pulses.poll(int(CHECK_S * 1000)):
                    rank, beat = pulse.unpack(self._pulses.recv())
                    with self._lock:
                        self._health.beat(rank, beat, time.monotonic())
                if (found := self._look()) is not None:
                    self.report(found)
        finally:
            self._pulses.close()

    def _look(self) -> Evidence | None:
        if (lost := self.watch()) is not None:
            return lost
        with self._lock:
            return self._health.check(time.monotonic()) if self._judging else None

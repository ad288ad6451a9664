"""Who is at fault: the decision over heartbeats, the record, and real slices killed and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.config import engine_config
from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineRequest, SequenceOutput
from arriero.shards.layout.resolve import resolve
from arriero.shards.leader.health import GroupHealth, HealthLimits
from arriero.shards.leader.remote_executor import RemoteExecutor
from arriero.shards.protocol.failure import (
    CAUSE_S,
    SETTLE_S,
    Evidence,
    FirstCause,
    Kind,
    RootCauseCollector,
)
from arriero.shards.protocol.heartbeat import Heartbeat
from support.processes import spawn_group

MODEL = os.environ.get("ARRIERO_TEST_MODEL", "")
LIMITS = HealthLimits(silence_s=3.0, hang_s=4.0, step_s=60.0)
BUSY = Heartbeat(step=7, phase="layers")
WAITS = Heartbeat(step=7, phase="layers", waits_for="all-reduce", progress=3)
IDLE = Heartbeat(step=6, phase="sample", idle=True, progress=3)


class Watched:
    """A group of two on a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.health = GroupHealth(LIMITS, ["slice 0", "slice 1"], self.now_s)

    def run(self, seconds: float, *heartbeats: Heartbeat | None) -> Evidence | None:
        """Let time pass; a rank whose heartbeat is None says nothing."""
        for _ in range(int(seconds * 2)):
            self.now_s += 0.5
            for rank, heartbeat in enumerate(heartbeats):
                if heartbeat is not None:
                    sent = replace(heartbeat, at_s=self.now_s + 50 * rank)  # clocks differ
                    self.health.beat(rank, sent, self.now_s)
            if (found := self.health.check(self.now_s)) is not None:
                return found
        return None


def test_an_idle_group_is_well() -> None:
    assert Watched().run(3600, IDLE, IDLE) is None


def test_a_long_step_of_a_device_is_no_hang() -> None:
    """The rank that samples waits for its device, the others for plans: the limit is a step's."""
    waits = replace(WAITS, waits_for="the device's result", on_device=True)
    group = Watched()
    group.health.plan_sent(7, group.now_s)
    assert group.run(LIMITS.step_s - 2, waits, IDLE) is None
    found = group.run(4, waits, IDLE)
    assert found is not None and found.kind is Kind.STUCK
    moving = Watched()
    moving.health.plan_sent(7, moving.now_s)
    for moves in range(3):
        assert moving.run(LIMITS.step_s - 2, replace(waits, progress=moves), IDLE) is None


def test_a_silent_slice_is_named_with_what_it_did() -> None:
    group = Watched()
    group.run(2, BUSY, WAITS)
    found = group.run(10, BUSY, None)
    assert found is not None
    assert (found.kind, found.rank, found.step) == (Kind.SILENT, 1, 7)
    assert found.collective == "all-reduce"
    assert 3.0 <= found.after_s <= 3.5


def test_a_long_computation_is_no_hang() -> None:
    group = Watched()
    group.health.plan_sent(7, group.now_s)
    assert group.run(50, BUSY, WAITS) is None
    found = group.run(60, BUSY, WAITS)
    assert found is not None and found.kind is Kind.STUCK


def test_all_waiting_is_a_hang_that_names_the_one_behind() -> None:
    group = Watched()
    group.health.plan_sent(7, group.now_s)
    behind = Heartbeat(step=7, phase="layers", waits_for="activations", progress=2)
    began_s = group.now_s
    found = group.run(60, WAITS, behind)
    assert found is not None
    assert (found.kind, found.rank, found.collective) == (Kind.STUCK, 1, "activations")
    assert group.now_s - began_s <= 5.0


def test_a_lost_plan_is_a_hang() -> None:
    group = Watched()
    group.health.plan_sent(7, group.now_s)
    found = group.run(60, IDLE, IDLE)
    assert found is not None and "plan of step 7" in found.summary


def test_waits_that_move_on_are_no_hang() -> None:
    group = Watched()
    group.health.plan_sent(7, group.now_s)
    for progress in range(100):
        moving = Heartbeat(step=7, phase="layers", waits_for="all-reduce", progress=progress)
        assert group.run(1, moving, WAITS) is None


def test_whoever_was_stopped_itself_accuses_nobody() -> None:
    group = Watched()
    group.run(2, IDLE, IDLE)
    group.now_s += 60
    assert group.health.check(group.now_s) is None
    assert group.run(2, IDLE, IDLE) is None


def test_heartbeats_that_come_but_late_are_silence() -> None:
    """A link that loses packets delivers all in order, ever later: what they tell is long over."""
    group = Watched()
    group.run(2, IDLE, IDLE)
    now_s, found = group.now_s, None
    for beat in range(1, 40):  # sent twice a second; each comes 0.3 s later than the one before
        sent_s, now_s = group.now_s + beat * 0.5, group.now_s + beat * 0.8
        group.health.beat(0, replace(IDLE, at_s=now_s), now_s)
        group.health.beat(1, replace(WAITS, at_s=sent_s + 50, progress=beat), now_s)
        if (found := group.health.check(now_s)) is not None:
            break
    assert found is not None
    assert (found.kind, found.rank) == (Kind.SILENT, 1)
    assert 3.0 <= found.after_s <= 3.5
    assert "s late: a link that loses or delays" in found.summary


def test_what_piled_up_while_we_were_stopped_is_not_late() -> None:
    group = Watched()
    group.run(2, IDLE, IDLE)
    before_s = group.now_s
    group.now_s += 60
    assert group.health.check(group.now_s) is None
    for beat in range(120):
        group.health.beat(1, replace(IDLE, at_s=before_s + beat * 0.5 + 50), group.now_s)
        assert group.health.check(group.now_s) is None
    assert group.run(2, IDLE, IDLE) is None


def test_clocks_may_drift_apart() -> None:
    group = Watched()
    for beat in range(100_000):
        group.now_s += 0.5
        for rank in range(2):
            sent = replace(IDLE, at_s=beat * 0.5 * (1 - 5e-4 * rank))
            group.health.beat(rank, sent, group.now_s)
        assert group.health.check(group.now_s) is None


def test_the_first_cause_is_not_the_first_to_be_heard() -> None:
    collector = RootCauseCollector()
    broke = Evidence(kind=Kind.ABORTED, summary="slice 0 failed in layers: broke off", rank=0)
    crash = Evidence(kind=Kind.CRASH, summary="slice 1 (pid 5) died", rank=1)
    silent = Evidence(kind=Kind.SILENT, summary="slice 1 is silent", rank=1, step=9, phase="layers")
    for at_s, one in enumerate((broke, silent, crash, crash)):
        collector.add(one, at_s * 0.1)
    assert not collector.settled(0.2) and collector.settled(SETTLE_S)
    found = collector.first_cause()
    assert found.cause.summary == crash.summary
    assert (found.cause.step, found.cause.phase) == (9, "layers")  # known from another piece
    assert found.folded == (broke.summary, silent.summary)
    assert FirstCause.from_wire(found.to_wire()) == found
    assert found.words()[0].endswith("slice 1 (pid 5) died")


def test_the_end_of_whoever_waited_for_another_is_not_the_first_cause() -> None:
    collector = RootCauseCollector()
    collector.add(Evidence(kind=Kind.ABORTED, summary="slice 1 failed: broke off", rank=1), 0.0)
    collector.add(Evidence(kind=Kind.CRASH, summary="slice 1 died", rank=1), 0.3)
    assert not collector.settled(SETTLE_S) and collector.settled(CAUSE_S)
    collector.add(Evidence(kind=Kind.CRASH, summary="slice 0 died", rank=0), 0.7)
    assert collector.settled(0.7)
    assert collector.first_cause().cause.summary == "slice 0 died"


def test_an_error_of_ones_own_comes_before_the_end_of_the_process() -> None:
    collector = RootCauseCollector()
    collector.add(Evidence(kind=Kind.ERROR, summary="slice 1 failed: no memory", rank=1), 0.0)
    collector.add(Evidence(kind=Kind.CRASH, summary="slice 1 ended", rank=1), 0.1)
    assert collector.first_cause().cause.kind is Kind.ERROR


class Running:
    """A group of two pipeline stages that generates without end."""

    def __init__(self) -> None:
        checkpoint = Checkpoint.open(MODEL)
        config = GroupConfig(
            model_path=MODEL, dtype="float32", pp=2, threads=1, kv_bytes=128 << 20,
            max_model_len=2048,
        )  # fmt: skip
        config = resolve(config, checkpoint.config)
        self.executor: RemoteExecutor = spawn_group(config)
        self.pids = [one.pid for one in self.executor.wait_ready(120)]
        self.flowing = threading.Event()
        self.lost = threading.Event()
        self.ends: list[SequenceOutput] = []
        limits = engine_config(config, checkpoint.config, checkpoint.digest)
        self.engine = Engine(limits, self.executor, self._take, on_failure=self._failed)
        self.engine.start()
        params = SamplingParams(max_tokens=2000, temperature=0.0, seed=0, ignore_eos=True)
        self.engine.submit(EngineRequest(request_id="r", prompt=(5, 6, 7), params=params))
        assert self.flowing.wait(60)
        time.sleep(1)  # a heartbeat or two

    def _take(self, outputs: list[SequenceOutput]) -> None:
        self.flowing.set()
        self.ends += [one for one in outputs if one.finish_reason is not None]

    def _failed(self, error: Exception) -> None:
        self.lost.set()


@pytest.mark.skipif(not MODEL, reason="ARRIERO_TEST_MODEL names no checkpoint folder")
@pytest.mark.parametrize(
    ("sign", "kind", "limit_s"),
    [(signal.SIGKILL, Kind.CRASH, 2.0), (signal.SIGSTOP, Kind.SILENT, 5.0)],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_slice_is_found_and_named(
    sign: signal.Signals, kind: Kind, limit_s: float, rank: int
) -> None:
    group = Running()
    try:
        begun_s = time.monotonic()
        os.kill(group.pids[rank], sign)
        assert group.lost.wait(30)
        took_s = time.monotonic() - begun_s
        found = group.executor.first_cause()
        assert found is not None
        assert (found.cause.kind, found.cause.rank, found.cause.pid) == (
            kind,
            rank,
            group.pids[rank],
        )
        assert found.cause.step > 0
        assert [one.finish_reason for one in group.ends] == ["lost"]
        assert took_s < limit_s
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(group.pids[rank], signal.SIGCONT)
        group.engine.stop()

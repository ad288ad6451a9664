"""Real ranks over gloo, one of which stalls: the others say so, and fail."""

from __future__ import annotations

import threading
import time
from multiprocessing.queues import Queue

import pytest
import torch

from arriero.shards.collectives.watchdog import Watchdog
from arriero.shards.errors import CollectiveFailed, GroupFailed
from support.ranks import joined, ranks, tell

LIMIT_S = 2.0
STALL_S = 20.0


def run_rank(rank: int, port: int, told: Queue[tuple[int, str, float]], tp: int) -> None:
    mesh = joined(rank, port, tp=tp, timeout_s=LIMIT_S)
    started = time.monotonic()
    try:
        for step in range(5):
            mesh.watchdog.step = step
            if step == 3 and rank == tp - 1:
                started = time.monotonic()
                time.sleep(STALL_S)
            started = time.monotonic()
            mesh.reduce(torch.ones(2, 32))
    except GroupFailed as error:
        tell(told, (rank, str(error), time.monotonic() - started))


@pytest.mark.parametrize("tp", [2, 3])
def test_a_stalled_rank_is_named_by_the_others(tp: int) -> None:
    with ranks(tp, run_rank, tp) as told:
        heard = [told.get(timeout=90) for _ in range(tp - 1)]
    assert {rank for rank, _, _ in heard} == set(range(tp - 1))
    stuck = [text for _, text, _ in heard if "stuck for" in text]
    assert stuck, heard
    for rank, text, waited in heard:
        assert text.startswith(f"all-reduce, rank {rank}, step 3, "), text
        assert waited < STALL_S / 2, "the group hung for as long as the rank"


def test_a_quick_wait_is_let_be() -> None:
    dog = Watchdog(0, 5.0)
    for _ in range(100):
        with dog.watch("nothing"):
            pass
    dog.close()
    assert dog.stuck is None


def test_a_broken_wait_names_itself() -> None:
    dog = Watchdog(3, 5.0)
    dog.step = 7
    with (
        pytest.raises(GroupFailed, match=r"^gather, rank 3, step 7, broke off after 0\.0 s: gone$"),
        dog.watch("gather"),
    ):
        raise RuntimeError("gone\nat 0x1")
    dog.close()


def test_a_wait_past_its_limit_is_aborted_once() -> None:
    aborted: list[float] = []
    dog = Watchdog(1, 0.1, lambda: aborted.append(time.monotonic()))
    with pytest.raises(GroupFailed, match=r"^all-reduce, rank 1, step 0, stuck for 0\.[1-9] s"):
        with dog.watch("all-reduce"):
            time.sleep(0.5)
    assert len(aborted) == 1
    dog.close()


class Work:
    """A device's queue: what was marked is passed once `done` reaches it."""

    def __init__(self) -> None:
        self.queued, self.done = 0, 0

    def mark(self) -> Passed:
        self.queued += 1
        return Passed(self, self.queued)


class Passed:
    def __init__(self, work: Work, place: int) -> None:
        self.work, self.place = work, place

    def query(self) -> bool:
        return self.work.done >= self.place


def test_of_queued_collectives_the_first_unfinished_is_named() -> None:
    work, aborted = Work(), threading.Event()
    dog = Watchdog(2, 0.2, aborted.set, work.mark)
    for step, name in enumerate(["all-reduce", "dispatch to experts", "results of experts"]):
        dog.step = step
        with dog.watch(name):
            pass
    work.done = 1
    dog.step = 9
    with pytest.raises(CollectiveFailed) as caught, dog.watch("the device's result"):
        assert dog.waits_for == "dispatch to experts"
        assert aborted.wait(5)
    assert str(caught.value).startswith("dispatch to experts, rank 2, step 1, stuck for 0.")
    assert (caught.value.collective, caught.value.step) == ("dispatch to experts", 1)
    dog.close()


def test_queued_collectives_that_end_are_forgotten() -> None:
    work = Work()
    dog = Watchdog(0, 0.2, mark=work.mark)
    for _ in range(50):
        with dog.watch("all-reduce"):
            work.done += 1
    time.sleep(0.5)
    assert dog.stuck is None and dog.waits_for == ""
    dog.close()


def test_what_the_device_passes_is_progress() -> None:
    """While the host waits for a long step, and a collective is stuck only since the one before."""
    work = Work()
    dog = Watchdog(0, 0.4, mark=work.mark)
    for _ in range(4):
        with dog.watch("all-reduce"):
            pass
    with dog.watch("the device's result"):
        assert dog.on_device
        for passed in range(1, 5):
            before = dog.progress
            time.sleep(0.25)
            work.done = passed
            assert dog.waits_for and dog.progress == before + 1
    assert dog.stuck is None, "four steps of 0.25 s are not one wait of a second"
    assert not dog.on_device
    dog.close()

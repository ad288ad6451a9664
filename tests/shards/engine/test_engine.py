"""The engine's thread: many requests, cancellation, failure, idleness."""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from arriero.shards.engine.engine import Engine
from arriero.shards.engine.types import EngineConfig, SequenceOutput
from arriero.shards.errors import GroupFailed, InvalidRequest, Overloaded, Unavailable
from arriero.shards.protocol.step_plan import StepPlan, StepResult
from support.eventually import eventually
from support.fake_slice import FakeSlice, answer

from .test_scheduler import make_config, make_request


class ThreadedExecutor:
    """A fake slice in a thread of its own, that can be slowed down, halted and lost."""

    def __init__(self, config: EngineConfig) -> None:
        self.slice = FakeSlice(config)
        self.plans: queue.Queue[StepPlan | None] = queue.Queue()
        self.results: queue.Queue[StepResult | GroupFailed] = queue.Queue()
        self.go = threading.Event()
        self.go.set()
        self.closed = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while (plan := self.plans.get()) is not None:
            self.go.wait()
            try:
                self.results.put(self.slice.run(plan))
            except Exception as error:
                self.results.put(GroupFailed(f"slice 0: {error!r}"))

    def submit(self, plan: StepPlan) -> None:
        self.plans.put(plan)

    def collect(self, timeout_s: float | None = None) -> StepResult | None:
        try:
            result = self.results.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(result, GroupFailed):
            raise result
        return result

    def lose(self, cause: str) -> None:
        self.results.put(GroupFailed(cause))

    def take_loads(self) -> dict[int, Any]:
        return {}

    def close(self) -> None:
        self.closed += 1
        self.go.set()
        self.plans.put(None)


class Streams:
    """Outputs by sample, and a way to wait for ends."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.tokens: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ends: dict[tuple[str, int], SequenceOutput] = {}
        self.threads: set[str] = set()

    def take(self, outputs: list[SequenceOutput]) -> None:
        assert outputs
        with self.lock:
            self.threads.add(threading.current_thread().name)
            for one in outputs:
                key = (one.request_id, one.index)
                assert key not in self.ends
                self.tokens[key] += one.tokens
                if one.finish_reason is not None:
                    self.ends[key] = one
            self.lock.notify_all()

    def wait(self, condition: Callable[[Streams], bool]) -> None:
        with self.lock:
            assert self.lock.wait_for(lambda: condition(self), timeout=20)


class Rig:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.streams = Streams()
        self.executor = ThreadedExecutor(config)
        self.failures: list[GroupFailed] = []
        self.engine = Engine(
            config, self.executor, self.streams.take, on_failure=self.failures.append
        )


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(make_config(max_batch_tokens=64, num_blocks=40))
    rig.engine.start()
    yield rig
    rig.engine.stop()
    rig.executor.thread.join(10)
    assert not rig.executor.thread.is_alive()


def test_64_requests_from_four_threads(rig: Rig) -> None:
    requests = [
        make_request(f"r{i}", [i % 7 + 2] * (i % 9 + 1), seed=i, max_tokens=12, n=1 + i % 2)
        for i in range(64)
    ]

    def submit(mine: list[int]) -> None:
        for i in mine:
            rig.engine.submit(requests[i])

    threads = [threading.Thread(target=submit, args=(range(k, 64, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.streams.wait(lambda s: len(s.ends) == 96)
    for request in requests:
        for index in range(request.params.n):
            expected = answer(rig.config, request, index)
            assert rig.streams.tokens[request.request_id, index] == expected.tokens
            end = rig.streams.ends[request.request_id, index]
            assert end.finish_reason == expected.finish_reason
    assert rig.streams.threads == {"arriero-engine"}
    stats = rig.engine.stats()
    assert stats.output_tokens == sum(len(one) for one in rig.streams.tokens.values())
    assert stats.num_running == stats.num_waiting == 0
    assert {"schedule", "wait", "update", "deliver"} == set(stats.step_us)


def test_idle_takes_no_cpu(rig: Rig) -> None:
    rig.engine.submit(make_request("r"))
    rig.streams.wait(lambda s: len(s.ends) == 1)
    time.sleep(0.05)  # the last steps planned ahead come in
    steps, begun = rig.engine.stats().steps, time.process_time()
    time.sleep(0.5)
    assert rig.engine.stats().steps == steps
    assert time.process_time() - begun < 0.05


def test_cancel_while_it_runs(rig: Rig) -> None:
    rig.executor.go.clear()
    for name in ("doomed", "other"):
        rig.engine.submit(make_request(name, ignore_eos=True, max_tokens=50))
    rig.engine.cancel("doomed")
    rig.engine.cancel("nobody")
    rig.executor.go.set()
    rig.streams.wait(lambda s: len(s.ends) == 2)
    assert rig.streams.ends["doomed", 0].finish_reason == "cancelled"
    assert len(rig.streams.tokens["doomed", 0]) < 50
    assert rig.streams.ends["other", 0].finish_reason == "length"
    assert len(rig.streams.tokens["other", 0]) == 50


def test_cancel_before_it_begins() -> None:
    rig = Rig(make_config())
    rig.engine.submit(make_request("r"))
    rig.engine.cancel("r")
    assert not rig.engine.step()
    assert rig.streams.ends["r", 0].finish_reason == "cancelled"
    rig.engine.stop()


def test_stepping_without_a_thread() -> None:
    rig = Rig(make_config())
    rig.engine.submit(request := make_request("r", n=2))
    while rig.engine.step():
        pass
    for index in range(2):
        assert rig.streams.tokens["r", index] == answer(rig.config, request, index).tokens
    rig.engine.stop()


def test_a_lost_group_ends_every_request_with_the_cause(rig: Rig) -> None:
    rig.executor.go.clear()
    for i in range(12):  # more than there are slots
        rig.engine.submit(make_request(f"r{i}"))
    rig.executor.lose("slice 1: out of memory")
    rig.streams.wait(lambda s: len(s.ends) == 12)
    for end in rig.streams.ends.values():
        assert end.finish_reason == "lost"
        assert end.error == "slice 1: out of memory"
    eventually(lambda: rig.failures, 5)
    assert rig.failures == [rig.engine.failure]
    assert rig.executor.closed
    with pytest.raises(Unavailable, match="slice 1: out of memory"):
        rig.engine.submit(make_request("late"))


def test_an_error_of_our_own_is_a_failure_too() -> None:
    rig = Rig(make_config())

    def broken(outputs: list[SequenceOutput]) -> None:
        raise ValueError("no such stream")

    engine = Engine(rig.config, rig.executor, broken, on_failure=rig.failures.append)
    engine.submit(make_request("r"))
    while engine.step():
        pass
    assert "ValueError: no such stream" in str(engine.failure)
    assert rig.failures == [engine.failure]
    engine.stop()


def test_stopping_ends_what_runs_even_when_the_slices_hang(rig: Rig) -> None:
    rig.executor.go.clear()
    rig.engine.submit(make_request("r"))
    time.sleep(0.05)
    rig.engine.stop()
    assert rig.streams.ends["r", 0].error == "the engine was stopped"
    with pytest.raises(Unavailable, match="stopped"):
        rig.engine.submit(make_request("late"))
    rig.engine.stop()


def test_submit_refuses_at_once() -> None:
    rig = Rig(make_config(max_queued=2))
    with pytest.raises(InvalidRequest):
        rig.engine.submit(make_request("r", ()))
    rig.engine.submit(make_request("a"))
    with pytest.raises(InvalidRequest, match="runs already"):
        rig.engine.submit(make_request("a"))
    rig.engine.submit(make_request("b"))
    with pytest.raises(Overloaded):
        rig.engine.submit(make_request("c"))
    assert rig.engine.stats().num_waiting == 2
    rig.engine.stop()
    assert len(rig.streams.ends) == 2

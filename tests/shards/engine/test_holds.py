"""Pauses, sleep and pushed weights as decisions: phases, refusals, and requests over them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from arriero.shards.engine.change_runner import ChangeRunner
from arriero.shards.engine.dp_scheduler import DataParallelScheduler
from arriero.shards.engine.holds import Activity, Change, Gate, Holds, HoldStatus, Kind
from arriero.shards.engine.types import SequenceOutput
from arriero.shards.errors import CheckpointError, GroupFailed, InvalidRequest
from arriero.shards.protocol.weights import WeightsAction, WeightsCommand, WeightsResult
from support.fake_slice import FakeExecutor, answer

from .test_scheduler import make_config, make_request

IDLE = Activity()
HASH = {0: b"x" * 16}


def result(command: WeightsCommand, rank: int = 0, **more: object) -> WeightsResult:
    hashes = HASH if rank == 0 else {}
    fields = {"shape": "s", "sample": "t", "hashes": hashes, "weights_bytes": 10}
    return WeightsResult(rank=rank, number=command.number, **fields | more)  # type: ignore[arg-type]


def command_of(holds: Holds, activity: Activity = IDLE) -> WeightsCommand:
    step = holds.next(activity)
    while step is not None and step.command is None:
        step = holds.next(activity)
    assert step is not None and step.command is not None
    return step.command


def push(*sources: str) -> Change:
    return Change(kind=Kind.PUSH, sources=sources)


def test_a_push_drains_before_the_slices_load() -> None:
    holds = Holds(2, "old")
    holds.begin(push("/b"), Activity(started=3, in_flight=1))
    check = command_of(holds, Activity(started=3, in_flight=1))
    assert check.action is WeightsAction.CHECK and holds.gate is Gate.OPEN
    holds.apply(result(check))
    assert holds.next(Activity(started=3)) is None, "a slice has not reported"
    holds.apply(result(check, 1))
    assert holds.next(Activity(started=3)) is not None
    assert holds.gate is Gate.DRAIN and holds.next(Activity(started=1, in_flight=1)) is None
    assert holds.next(Activity(in_flight=1)) is None and holds.gate is Gate.CLOSED
    step = holds.next(IDLE)
    assert step is not None and step.empty_cache and holds.digest == "old"
    load = command_of(holds)
    assert (load.action, load.sources) == (WeightsAction.LOAD, ("/b",))
    holds.apply(result(check))  # of another command: ignored
    holds.apply(result(load))
    holds.apply(result(load, 1))
    step = holds.next(IDLE)
    assert step is not None and step.done and step.loaded and len(step.digest) == 32
    assert holds.gate is Gate.OPEN and holds.status().sources == ("/b",)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"error": "no tensor"}, "no tensor"),
        ({"sample": "other"}, "different files"),
        ({"hashes": HASH}, "exactly once|once"),
    ],
)
def test_refused_weights_change_nothing(second: dict[str, object], said: str) -> None:
    holds = Holds(2, "old")
    holds.begin(push("/b"), IDLE)
    check = command_of(holds)
    holds.apply(result(check))
    holds.apply(result(check, 1, **second))
    step = holds.next(IDLE)
    if "once" in said and step is not None and not step.error:
        pytest.fail("a tensor that two slices hashed was accepted")
    assert step is not None and step.done and any(word in step.error for word in said.split("|"))
    assert holds.gate is Gate.OPEN and holds.digest == "old" and holds.status().sources == ()


def test_a_load_that_fails_on_a_slice_ends_the_group() -> None:
    holds = Holds(1, "old")
    holds.begin(push("/b"), IDLE)
    holds.apply(result(command_of(holds)))
    load = command_of(holds)
    holds.apply(result(load, error="the files have changed"))
    with pytest.raises(GroupFailed, match="have changed"):
        holds.next(IDLE)


def test_changes_that_make_no_sense_are_refused() -> None:
    holds = Holds(1, "old")
    holds.begin(Change(kind=Kind.PAUSE, mode="wait"), Activity(started=1))
    with pytest.raises(InvalidRequest, match="in the middle of pause: drain"):
        holds.begin(push("/b"), IDLE)
    while holds.next(IDLE) is not None:
        pass
    assert holds.status().paused and holds.gate is Gate.CLOSED
    with pytest.raises(InvalidRequest, match="two versions"):
        holds.begin(push("/b"), Activity(started=1))
    assert holds.begin(Change(kind=Kind.RESUME), IDLE) and holds.gate is Gate.OPEN


def test_a_push_asleep_takes_effect_with_the_wake() -> None:
    holds = Holds(1, "old")
    holds.begin(Change(kind=Kind.SLEEP, level=2), IDLE)
    release = command_of(holds)
    assert release.action is WeightsAction.RELEASE and not release.keep_on_host
    holds.apply(result(release, weights_bytes=0))
    assert holds.next(IDLE) is not None and holds.status().level == 2
    holds.begin(push("/b"), IDLE)
    holds.apply(result(command_of(holds)))
    step = holds.next(IDLE)
    assert step is not None and step.done and step.digest and not step.loaded
    holds.begin(Change(kind=Kind.WAKE), IDLE)
    load = command_of(holds)
    assert load.sources == ("/b",) and holds.gate is Gate.CLOSED
    holds.apply(result(load))
    assert holds.next(IDLE) is not None and holds.gate is Gate.OPEN


class Slices(FakeExecutor):
    """Fake slices whose commands on weights end at once or later."""

    def __init__(self, config: object, rng: random.Random) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.rng, self.waiting, self.version = rng, [], "old"  # type: ignore[var-annotated]

    def change_weights(self, command: WeightsCommand) -> None:
        in_flight = bool(self.results) and command.action.between_steps
        assert not in_flight, "slices change their weights between two steps"
        self.waiting.append(command)

    def collect_weights(self, timeout_s: float = 0.0) -> list[WeightsResult]:
        if not self.waiting or self.rng.random() < 0.7:
            return []
        command = self.waiting.pop()
        if command.sources == ("/bad",):
            return [result(command, error="bad")]
        seed = str(command.sources).encode()[:16].ljust(16)
        return [result(command, hashes={0: seed})]


def finish(
    changes: ChangeRunner,
    scheduler: DataParallelScheduler,
    executor: Slices,
    outputs: list[SequenceOutput],
    flush: Callable[[], None],
    done: Callable[[], bool],
) -> None:
    """End pause and sleep, and run until every request has ended."""
    for _ in range(4000):  # let everything end
        changes.advance(outputs.extend, flush, lambda: None)
        if not changes.busy:
            for kind in (Kind.WAKE, Kind.RESUME):
                if not changes.busy:
                    changes.begin(Change(kind=kind), Future())
        for plan in scheduler.schedule():
            executor.submit(plan)
        while (collected := executor.collect()) is not None:
            outputs += scheduler.update(collected)
        flush()
        if done():
            break


@pytest.mark.parametrize("seed", range(5))
def test_requests_over_random_changes(seed: int) -> None:
    """Every request ends with its own tokens, and no output crosses a change of weights."""
    rng = random.Random(seed)
    config = make_config(num_blocks=40)
    executor = Slices(config, rng)
    scheduler = DataParallelScheduler(config)
    changes = ChangeRunner(scheduler, executor, 1)  # type: ignore[arg-type]
    digest = "old"
    first: dict[str, str] = {}
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str | None] = {}

    def deliver(outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.tokens:
                assert first.setdefault(output.request_id, digest) == digest, "an answer of two"
            tokens.setdefault(output.request_id, []).extend(output.tokens)
            if output.finish_reason is not None:
                ends[output.request_id] = output.finish_reason
        outputs.clear()

    def on_weights(new: str) -> bytes:
        nonlocal digest
        digest = new
        return new.encode()

    changes.name_weights(digest, (), on_weights)
    requests = {}
    outputs: list[SequenceOutput] = []

    def flush() -> None:
        deliver(outputs)

    aborted = False
    for step in range(1500):
        if rng.random() < 0.15 and len(requests) < 40:
            request = make_request(f"r{step}", prompt=tuple(rng.choices(range(50), k=9)))
            requests[request.request_id] = request
            outputs += scheduler.enqueue(request)
        if rng.random() < 0.05:
            kind = rng.choice(list(Kind))
            mode = rng.choice(("keep", "keep", "wait", "wait", "abort"))
            aborted = aborted or mode == "abort"
            change = Change(kind=kind, mode=mode, sources=(rng.choice(("/b", "/c", "/bad")),))  # type: ignore[arg-type]
            future: Future[HoldStatus] = Future()
            with contextlib.suppress(InvalidRequest):
                changes.begin(change, future)
        changes.advance(outputs.extend, flush, lambda: None)
        for plan in scheduler.schedule():
            executor.submit(plan)
        if executor.results and rng.random() < 0.7:
            collected = executor.collect()
            assert collected is not None
            outputs += scheduler.update(collected)
        deliver(outputs)
    finish(changes, scheduler, executor, outputs, flush, lambda: len(ends) == len(requests))
    assert set(ends) == set(requests)
    for name, request in requests.items():
        if ends[name] == "error":
            assert aborted
        else:
            assert tokens[name] == list(answer(config, request, 0).tokens)


def test_refused_pushes_reach_the_caller() -> None:
    executor = Slices(make_config(), random.Random(1))
    scheduler = DataParallelScheduler(make_config())
    changes = ChangeRunner(scheduler, executor, 1)  # type: ignore[arg-type]
    future: Future[HoldStatus] = Future()
    changes.begin(push("/bad"), future)
    while not future.done():
        changes.advance(lambda outputs: None, lambda: None, lambda: None)
    with pytest.raises(CheckpointError, match="bad"):
        future.result()

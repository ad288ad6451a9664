"""Adapters in slots: none in use is replaced, every request ends, a failed load harms no other."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.engine.adapter_residency import AdapterResidency
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest, SequenceOutput
from arriero.shards.errors import InvalidRequest
from arriero.shards.protocol.adapters import AdapterLoad, AdapterResult
from support.fake_adapters import AdapterExecutor

from .test_scheduler import make_config, make_request


class Run:
    """A scheduler over a fake slice with adapters."""

    def __init__(
        self, config: EngineConfig, rng: random.Random, broken: frozenset[str] = frozenset()
    ) -> None:
        self.scheduler = Scheduler(config)
        self.executor = AdapterExecutor(config, rng, broken)
        self.outputs: dict[str, list[SequenceOutput]] = defaultdict(list)

    def take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            self.outputs[output.request_id].append(output)

    def step(self) -> None:
        """As the engine's step."""
        scheduler, executor = self.scheduler, self.executor
        waits = not scheduler.num_outstanding
        if scheduler.adapters.num_loading:
            results = executor.collect_adapters(0.001 if waits else 0.0)
            self.take(scheduler.apply_adapters(results)[0])
        while (plan := scheduler.schedule()) is not None:
            executor.submit(plan)
        batch = scheduler.adapters.take_batch()
        if batch is not None:
            executor.change_adapters(batch)
        result = executor.collect()
        if result is not None:
            self.take(scheduler.update(result))

    def finish(self, most_steps: int) -> None:
        for _ in range(most_steps):
            if not self.scheduler.num_live:
                break
            self.step()
        assert not self.scheduler.num_live, "requests starve"

    def reason(self, request_id: str) -> str | None:
        return self.outputs[request_id][-1].finish_reason


def slotted(device: int, host: int, num_ranks: int = 1, **changes: object) -> EngineConfig:
    slots = AdapterSlots(device=device, host=host)
    return make_config(adapter_slots=slots, num_ranks=num_ranks, **changes)


def wanting(request_id: str, adapter: str, **changes: object) -> EngineRequest:
    return replace(make_request(request_id, **changes), adapter=adapter)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1 << 30),
    device=st.integers(1, 3),
    spare=st.integers(1, 4),
    num_ranks=st.integers(1, 2),
    num_adapters=st.integers(1, 9),
    num_blocks=st.integers(16, 40),
)
def test_every_request_ends_as_it_must(
    seed: int, device: int, spare: int, num_ranks: int, num_adapters: int, num_blocks: int
) -> None:
    rng = random.Random(seed)
    names = [f"a{i}" for i in range(num_adapters)]
    broken = frozenset(name for name in names if rng.random() < 0.15)
    config = slotted(
        device, device + spare, num_ranks, num_blocks=num_blocks, max_sequences=rng.randint(1, 6)
    )
    run = Run(config, rng, broken)
    for name in names:
        run.scheduler.adapters.offer(name, f"/adapters/{name}")
    requests, withdrawn = [], set()
    for number in range(30):
        adapter = rng.choice(["", *names])
        request = wanting(
            f"r{number}",
            adapter,
            prompt=[rng.randrange(2, 50) for _ in range(rng.randint(1, 12))],
            max_tokens=rng.randint(1, 10),
            priority=rng.choice([0, 0, 0, 1]),
        )
        if adapter in withdrawn:
            with pytest.raises(InvalidRequest, match="not on this group"):
                run.scheduler.add(request)
        else:
            run.scheduler.add(request)
            requests.append(request)
        for _ in range(rng.randint(0, 3)):
            run.step()
        if rng.random() < 0.1:
            name = rng.choice(names)
            run.scheduler.adapters.withdraw(name)
            withdrawn.add(name)
        if rng.random() < 0.1:
            run.take(run.scheduler.cancel(rng.choice(requests).request_id))
    run.finish(3000)
    for request in requests:
        reason = run.reason(request.request_id)
        if request.adapter in broken:
            assert reason in ("error", "cancelled")
        else:
            assert reason in ("stop", "length", "cancelled"), run.outputs[request.request_id]


def test_others_run_while_an_adapter_is_loaded() -> None:
    run = Run(slotted(1, 2), random.Random(1))
    run.scheduler.adapters.offer("a", "/adapters/a")
    run.scheduler.add(wanting("first", "a"))
    run.scheduler.add(wanting("second", ""))
    plan = run.scheduler.schedule()
    assert plan is not None and [new.adapter for new in plan.new] == [-1]
    batch = run.scheduler.adapters.take_batch()
    assert batch is not None and batch.loads == [AdapterLoad("a", "/adapters/a")]


def test_a_stream_of_requests_for_one_slot_starves_nobody() -> None:
    """A request behind a claim does not enter the claimed slot, however many come."""
    run = Run(slotted(1, 2, max_sequences=4), random.Random(1))
    for name in "ab":
        run.scheduler.adapters.offer(name, f"/adapters/{name}")
    for number in range(3):
        run.scheduler.add(wanting(f"a{number}", "a", max_tokens=8, ignore_eos=True))
    for _ in range(4):
        run.step()
    run.scheduler.add(wanting("b", "b", max_tokens=2, ignore_eos=True))
    for number in range(3, 60):
        run.scheduler.add(wanting(f"a{number}", "a", max_tokens=8, ignore_eos=True))
        run.step()
        if run.outputs["b"] and run.reason("b") is not None:
            break
    assert run.reason("b") == "length", "the request for b waits for ever"
    assert number < 30
    run.finish(3000)


def test_a_withdrawn_adapter_stays_until_its_requests_have_ended() -> None:
    run = Run(slotted(1, 2), random.Random(1))
    run.scheduler.adapters.offer("a", "/adapters/a")
    run.scheduler.add(wanting("r", "a", max_tokens=20, ignore_eos=True))
    for _ in range(5):
        run.step()
    run.scheduler.adapters.withdraw("a")
    assert "a" not in run.scheduler.adapters.offered
    assert run.scheduler.adapters.stats.in_slots == ("a",)
    run.finish(100)
    assert run.reason("r") == "length"
    run.step()
    assert run.scheduler.adapters.stats.in_slots == () and not run.executor.host


def test_listed_adapters_without_slots_are_where_they_always_were() -> None:
    residency = AdapterResidency(None, [("x", "/x"), ("y", "/y")], 1)
    assert not residency.has_any and set(residency.stats.in_slots) == {"x", "y"}
    assert [residency.slot_for(digest) for digest in ("y", "x", "y")] == [1, 0, 1]
    residency.enter("y", 1)
    assert residency.take_changes() == []


def test_the_error_of_any_rank_counts() -> None:
    residency = AdapterResidency(AdapterSlots(device=1, host=2), [("x", "/x")], 2)
    residency.prepare(["x"])
    assert residency.take_batch() is not None
    assert residency.apply(AdapterResult(rank=1, digest="x", error="no such file")) is None
    assert residency.apply(AdapterResult(rank=0, digest="x")) == "no such file"
    batch = residency.take_batch()
    assert batch is not None and batch.dropped == ["x"], "the other rank has a copy"

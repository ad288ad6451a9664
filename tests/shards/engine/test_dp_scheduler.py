"""Lanes: each request its own tokens, every lane a plan in every step."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.engine.dp_scheduler import DataParallelScheduler
from arriero.shards.engine.types import EngineConfig, SequenceOutput
from arriero.shards.errors import GroupFailed, InvalidRequest, Overloaded
from arriero.shards.kv.limits import GroupTierLimits, TierLimits
from arriero.shards.kv.transfers import Pool, Segment, TransferResult
from arriero.shards.protocol.step_plan import StepResult, int32
from support.fake_slice import FakeExecutor, answer

from .test_scheduler import VOCAB, make_config, make_request


class Run:
    """Drives lanes, each with a slice of its own; results come back in any order of lanes."""

    def __init__(self, config: EngineConfig, rng: random.Random) -> None:
        self.lanes, self.rng, self.config = DataParallelScheduler(config), rng, config
        self.slices = [FakeExecutor(config) for _ in range(config.num_lanes)]
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = defaultdict(list)
        self.busy = Counter[int]()

    def submit(self) -> bool:
        plans = self.lanes.schedule()
        assert len(plans) in (0, len(self.slices))
        assert len({plan.step for plan in plans}) < 2
        assert not plans or any(len(plan.slots) for plan in plans)
        for dp_rank, plan in enumerate(plans):
            assert plan.dp_rank == dp_rank
            self.busy[dp_rank] += bool(len(plan.slots))
            self.slices[dp_rank].submit(plan)
        return bool(plans)

    def collect(self) -> bool:
        ready = [one for one in self.slices if one.results]
        if ready:
            result = self.rng.choice(ready).collect()
            assert result is not None
            for one in self.lanes.update(result):
                self.outputs[one.request_id, one.index].append(one)
        return bool(ready)

    def finish(self) -> None:
        while self.submit() or self.collect():
            pass
        assert not self.lanes.num_live and not self.lanes.num_outstanding
        assert self.lanes.stats.blocks_used == 0


@settings(max_examples=100, deadline=None)
@given(
    num_lanes=st.integers(1, 4),
    num_stages=st.integers(1, 2),
    chunk=st.sampled_from([0, 8]),
    seed=st.integers(0, 2**32),
)
def test_every_request_gets_its_own_tokens(
    num_lanes: int, num_stages: int, chunk: int, seed: int
) -> None:
    config = make_config(
        num_lanes=num_lanes,
        num_stages=num_stages,
        num_blocks=20,
        attention_chunk=chunk,
        num_local_blocks=6,
    )
    rng = random.Random(seed)
    run = Run(config, rng)
    requests = [
        make_request(
            f"r{i}",
            [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30))],
            max_tokens=rng.randrange(1, 12),
            n=rng.choice([1, 1, 2]),
            seed=rng.randrange(3),
        )
        for i in range(rng.randrange(1, 14))
    ]
    cancelled = set()
    for request in requests:
        run.lanes.check_load(request.request_id)
        run.lanes.enqueue(request)
        for _ in range(rng.randrange(3)):
            rng.choice([run.submit, run.collect])()
        if rng.random() < 0.1:
            cancelled.add(request.request_id)
            run.lanes.cancel(request.request_id)
    run.finish()
    for request in requests:
        for index in range(request.params.n):
            tokens = [t for one in run.outputs[request.request_id, index] for t in one.tokens]
            expected = answer(config, request, index).tokens
            if request.request_id in cancelled:
                expected = expected[: len(tokens)]
            assert tokens == expected


def test_work_is_spread_and_prefixes_draw() -> None:
    run = Run(make_config(num_lanes=2), random.Random(0))
    for i in range(8):
        run.lanes.enqueue(make_request(f"r{i}", [i + 2] * 9, ignore_eos=True))
    run.finish()
    assert run.busy[0] == run.busy[1]
    # a prompt that one lane knows goes there, though both are idle
    for name in ("again", "and again", "once more"):
        run.lanes.enqueue(make_request(name, [3] * 9))
        run.finish()
        assert run.outputs[name, 0][0].num_cached == 8


def test_limits_are_the_group_s() -> None:
    lanes = DataParallelScheduler(make_config(num_lanes=2, max_queued=3))
    for i in range(3):
        lanes.check_load(f"r{i}")
        lanes.enqueue(make_request(f"r{i}"))
    with pytest.raises(Overloaded):
        lanes.check_load("one more")
    with pytest.raises(InvalidRequest):
        lanes.check_load("r1")


def test_a_result_of_no_lane_is_refused() -> None:
    lanes = DataParallelScheduler(make_config(num_lanes=2))
    with pytest.raises(GroupFailed):
        lanes.update(StepResult(step=0, tokens=int32(), dp_rank=2))


def test_events_are_told_once() -> None:
    told = Counter[tuple[str, bytes]]()

    def listen(kind: str, key: bytes) -> None:
        told[kind, key] += 1

    config = make_config(num_lanes=2, max_sequences=1)
    run = Run(config, random.Random(1))
    run.lanes = DataParallelScheduler(config, on_event=listen)
    for i in range(4):  # both lanes compute the same prompt
        run.lanes.enqueue(make_request(f"r{i}", [7] * 12, seed=1))
    run.finish()
    assert told and set(told.values()) == {1}


def test_what_lanes_keep_below_is_told_once() -> None:
    told = Counter[tuple[str, bytes]]()

    def listen(kind: str, key: bytes) -> None:
        told[kind, key] += 1

    tiers = GroupTierLimits(all=TierLimits(host_blocks=8))
    config = make_config(num_lanes=2, max_sequences=1, tiers=tiers)
    run = Run(config, random.Random(1))
    run.lanes = DataParallelScheduler(config, on_event=listen)
    memory = Segment(0, 0, "", "", (0, 1), (0, 1), (4, 1, 1), 8)
    run.lanes.take_moved(
        [TransferResult(0, ready=True, segment=memory, dp_rank=dp_rank) for dp_rank in (0, 1)]
    )
    for i in range(2):  # both lanes compute the same prompt
        run.lanes.enqueue(make_request(f"r{i}", [7] * 12, seed=1))
    run.finish()
    saved = Counter[int]()
    while taken := run.lanes.take_moves():
        for moves in taken:
            saved[moves.dp_rank] += len(moves.moves)
            done = [move.id for move in moves.moves]
            run.lanes.take_moved([TransferResult(0, done=done, dp_rank=moves.dp_rank)])
    assert saved[0] == saved[1] > 0
    kept = [key for kind, key in told if kind == "kept"]
    assert len(kept) == saved[0] and run.lanes.stats.tiers["host"] == 2 * saved[0]
    assert run.lanes.shared(kept)[Pool.ALL].slots.keys() == set(kept)
    run.lanes.flush()
    assert set(told.values()) == {1}
    assert {key for kind, key in told if kind == "dropped"} == set(kept)

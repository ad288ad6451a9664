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
from support.examples import examples
from support.fake_slice import FakeExecutor, answer

from .test_scheduler import VOCAB, make_config, make_request


class Run:
    """Drives DP ranks, each with a slice of its own; results come back in any order of ranks."""

    def __init__(self, config: EngineConfig, rng: random.Random) -> None:
        self.scheduler, self.rng, self.config = DataParallelScheduler(config), rng, config
        self.slices = [FakeExecutor(config) for _ in range(config.num_dp_ranks)]
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = defaultdict(list)
        self.busy = Counter[int]()

    def submit(self) -> bool:
        plans = self.scheduler.schedule()
        assert len(plans) in (0, len(self.slices))
        assert len({plan.step for plan in plans}) < 2
        assert not plans or any(len(plan.slots) for plan in plans)
        decodes = all((plan.counts == plan.samples).all() for plan in plans)
        most = max((len(plan.tokens) for plan in plans), default=0) if decodes else 0
        for dp_rank, plan in enumerate(plans):
            assert plan.dp_rank == dp_rank
            assert plan.decodes == (most if len(plans) > 1 else 0), "all ranks, or none"
            self.busy[dp_rank] += bool(len(plan.slots))
            self.slices[dp_rank].submit(plan)
        return bool(plans)

    def collect(self) -> bool:
        ready = [one for one in self.slices if one.results]
        if ready:
            result = self.rng.choice(ready).collect()
            assert result is not None
            for one in self.scheduler.update(result):
                self.outputs[one.request_id, one.index].append(one)
        return bool(ready)

    def finish(self) -> None:
        while self.submit() or self.collect():
            pass
        assert not self.scheduler.num_live and not self.scheduler.num_outstanding
        assert self.scheduler.stats.blocks_used == 0


@settings(max_examples=examples(100), deadline=None)
@given(
    num_dp_ranks=st.integers(1, 4),
    num_stages=st.integers(1, 2),
    chunk=st.sampled_from([0, 8]),
    seed=st.integers(0, 2**32),
)
def test_every_request_gets_its_own_tokens(
    num_dp_ranks: int, num_stages: int, chunk: int, seed: int
) -> None:
    config = make_config(
        num_dp_ranks=num_dp_ranks,
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
        run.scheduler.check_load(request.request_id)
        run.scheduler.enqueue(request)
        for _ in range(rng.randrange(3)):
            rng.choice([run.submit, run.collect])()
        if rng.random() < 0.1:
            cancelled.add(request.request_id)
            run.scheduler.cancel(request.request_id)
    run.finish()
    for request in requests:
        for index in range(request.params.n):
            tokens = [t for one in run.outputs[request.request_id, index] for t in one.tokens]
            expected = answer(config, request, index).tokens
            if request.request_id in cancelled:
                expected = expected[: len(tokens)]
            assert tokens == expected


def test_work_is_spread_and_prefixes_draw() -> None:
    run = Run(make_config(num_dp_ranks=2), random.Random(0))
    for i in range(8):
        run.scheduler.enqueue(make_request(f"r{i}", [i + 2] * 9, ignore_eos=True))
    run.finish()
    assert run.busy[0] == run.busy[1]
    # a prompt in one rank's cache goes to that rank, though both are idle
    for name in ("again", "and again", "once more"):
        run.scheduler.enqueue(make_request(name, [3] * 9))
        run.finish()
        assert run.outputs[name, 0][0].num_cached == 8


def test_limits_are_the_group_s() -> None:
    scheduler = DataParallelScheduler(make_config(num_dp_ranks=2, max_queued=3))
    for i in range(3):
        scheduler.check_load(f"r{i}")
        scheduler.enqueue(make_request(f"r{i}"))
    with pytest.raises(Overloaded):
        scheduler.check_load("one more")
    with pytest.raises(InvalidRequest):
        scheduler.check_load("r1")


def test_a_result_of_an_unknown_rank_is_refused() -> None:
    scheduler = DataParallelScheduler(make_config(num_dp_ranks=2))
    with pytest.raises(GroupFailed):
        scheduler.update(StepResult(step=0, tokens=int32(), dp_rank=2))


def test_events_are_reported_once() -> None:
    events = Counter[tuple[str, bytes]]()

    def listen(kind: str, key: bytes) -> None:
        events[kind, key] += 1

    config = make_config(num_dp_ranks=2, max_sequences=1)
    run = Run(config, random.Random(1))
    run.scheduler = DataParallelScheduler(config, on_event=listen)
    for i in range(4):  # both ranks compute the same prompt
        run.scheduler.enqueue(make_request(f"r{i}", [7] * 12, seed=1))
    run.finish()
    assert events and set(events.values()) == {1}


def test_keys_that_ranks_keep_below_are_reported_once() -> None:
    events = Counter[tuple[str, bytes]]()

    def listen(kind: str, key: bytes) -> None:
        events[kind, key] += 1

    tiers = GroupTierLimits(all=TierLimits(host_blocks=8))
    config = make_config(num_dp_ranks=2, max_sequences=1, tiers=tiers)
    run = Run(config, random.Random(1))
    run.scheduler = DataParallelScheduler(config, on_event=listen)
    memory = Segment(0, 0, "", "", (0, 1), (0, 1), (4, 1, 1), 8)
    run.scheduler.apply_results(
        [TransferResult(0, ready=True, segment=memory, dp_rank=dp_rank) for dp_rank in (0, 1)]
    )
    for i in range(2):  # both ranks compute the same prompt
        run.scheduler.enqueue(make_request(f"r{i}", [7] * 12, seed=1))
    run.finish()
    saved = Counter[int]()
    while batches := run.scheduler.take_transfers():
        for batch in batches:
            saved[batch.dp_rank] += len(batch.transfers)
            done = [transfer.id for transfer in batch.transfers]
            run.scheduler.apply_results([TransferResult(0, done=done, dp_rank=batch.dp_rank)])
    assert saved[0] == saved[1] > 0
    kept_keys = [key for kind, key in events if kind == "kept"]
    assert len(kept_keys) == saved[0] and run.scheduler.stats.tiers["host"] == 2 * saved[0]
    assert run.scheduler.shared(kept_keys)[Pool.ALL].slots.keys() == set(kept_keys)
    run.scheduler.flush()
    assert set(events.values()) == {1}
    assert {key for kind, key in events if kind == "dropped"} == set(kept_keys)

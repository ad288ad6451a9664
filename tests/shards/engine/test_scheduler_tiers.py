"""The scheduler with tiers below the device, in a world where every copy may be late or fail."""

from __future__ import annotations

import random
from collections import defaultdict
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest, SequenceOutput
from arriero.shards.engine.waiting import PATIENCE_S
from arriero.shards.errors import InvalidRequest
from arriero.shards.kv.limits import GroupTierLimits, TierLimits
from support.examples import examples
from support.fake_slice import answer
from support.fake_tiers import FaultyTiers

VOCAB = 6


class Run:
    """A scheduler over faulty tiers, in virtual time."""

    def __init__(self, config: EngineConfig, rng: random.Random, faults: float, disk: Any) -> None:  # noqa: ANN401
        self.config, self.rng = config, rng
        self.now = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now)
        self.world = FaultyTiers(config, rng, faults, disk)
        self.outputs: dict[str, list[SequenceOutput]] = defaultdict(list)

    def apply_results(self) -> None:
        self.rng.shuffle(self.world.transfer_results)
        self.scheduler.apply_results(self.world.collect_transfers())

    def submit(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.world.submit(plan)
        for batch in self.scheduler.take_transfers():
            self.world.transfer(batch)
        return plan is not None

    def collect(self) -> bool:
        result = self.world.collect()
        if result is not None:
            for one in self.scheduler.update(result):
                self.outputs[one.request_id].append(one)
        return result is not None

    def finish(self, *, stuck: bool = False) -> None:
        """Run on until nothing is left to do; with `stuck` no copy is ever made again."""
        for _ in range(5000):
            self.apply_results()
            while self.submit():
                pass
            if not stuck:
                self.world.work()
            busy = self.collect() or self.scheduler.num_live
            if not busy and (stuck or not self.scheduler.num_transfers):
                break
            self.now += PATIENCE_S / 10
        assert not self.scheduler.num_live, "stuck"
        stats = self.scheduler.stats
        assert stats.num_waiting == stats.num_running == 0
        if not stuck:
            assert stats.blocks_used == 0 and stats.local_blocks_used == 0, "leaked"


@st.composite
def worlds(draw: st.DrawFn) -> EngineConfig:
    size = draw(st.sampled_from([2, 4]))
    chunk = size * draw(st.sampled_from([0, 0, 1, 3]))
    window = 0 if chunk else draw(st.sampled_from([0, 1, 5, 12]))
    num_blocks = draw(st.integers(48 // size, 64 // size))
    ranks = draw(st.integers(1, 3))
    limits = st.builds(
        TierLimits,
        host_blocks=st.sampled_from([0, 3, 40]),
        disk_blocks=st.sampled_from([4, 60]),
        max_tenant_share=st.sampled_from([0.5, 1.0]),
        num_ranks=st.just(ranks),
    )
    return EngineConfig(
        max_model_len=48,
        block_size=size,
        num_blocks=num_blocks,
        attention_chunk=chunk,
        num_local_blocks=draw(st.integers(chunk // size, 3 * chunk // size)) if chunk else 0,
        attention_window=window,
        attention_sinks=draw(st.sampled_from([0, 3])) if window else 0,
        max_sequences=draw(st.integers(1, 4)),
        max_batch_tokens=draw(st.integers(3, 24)),
        vocab_size=VOCAB,
        pipeline_depth=draw(st.integers(1, 3)),
        tiers=GroupTierLimits(all=draw(limits), local=draw(limits)),
    )


@settings(max_examples=examples(80), deadline=None)
@given(config=worlds(), seed=st.integers(0, 2**32), faults=st.sampled_from([0.0, 0.1, 0.5]))
def test_every_request_gets_its_own_tokens_whatever_tiers_do(
    config: EngineConfig, seed: int, faults: float
) -> None:
    rng = random.Random(seed)
    disk: dict[Any, Any] = {}
    shared = [rng.randrange(VOCAB) for _ in range(40)]
    for _ in range(2):  # the second group begins with the disk that the first one left
        run = Run(config, rng, faults, disk)
        requests = []
        for i in range(12):
            prompt = shared[: rng.randrange(1, 36)]
            prompt += [rng.randrange(VOCAB) for _ in range(rng.randrange(0, 5))]
            params = SamplingParams(seed=rng.randrange(2), max_tokens=rng.randrange(1, 8))
            tenant = rng.choice(["", "a", "b"])
            requests.append(
                EngineRequest(
                    request_id=f"r{i}", prompt=tuple(prompt), params=params, tenant=tenant
                )
            )
            run.scheduler.add(requests[-1])
            for _ in range(rng.randrange(4)):
                rng.choice([run.submit, run.collect, run.world.work, run.apply_results])()
            match rng.randrange(12):
                case 0:
                    with suppress(InvalidRequest):
                        run.scheduler.pin(rng.choice("ab"), tuple(prompt))
                case 1:
                    run.scheduler.unpin("a")
                case 2:
                    run.scheduler.flush()
            if rng.random() < 0.1:
                for one in run.scheduler.cancel(rng.choice(requests).request_id):
                    run.outputs[one.request_id].append(one)
        for name in "ab":
            run.scheduler.unpin(name)
        run.finish()
        for request in requests:
            stream = run.outputs[request.request_id]
            tokens = [token for one in stream for token in one.tokens]
            expected = answer(config, request, 0).tokens
            if stream[-1].finish_reason == "cancelled":
                expected = expected[: len(tokens)]
            assert tokens == expected


def test_a_tier_that_gives_no_sign_of_life_is_not_waited_for() -> None:
    limits = TierLimits(disk_blocks=50)
    config = EngineConfig(
        max_model_len=48,
        block_size=4,
        num_blocks=24,
        vocab_size=VOCAB,
        tiers=GroupTierLimits(all=limits),
    )
    rng = random.Random(0)
    params = SamplingParams(seed=0, max_tokens=4)
    request = EngineRequest(request_id="a", prompt=(1, 2, 3, 4) * 5, params=params)
    first = Run(config, rng, 0.0, None)
    first.scheduler.add(request)
    first.finish()
    second = Run(config, rng, 0.0, first.world.disk)
    second.apply_results()
    second.scheduler.add(request)
    second.finish(stuck=True)
    assert [t for one in second.outputs["a"] for t in one.tokens] == answer(
        config, request, 0
    ).tokens
    assert second.outputs["a"][0].num_cached == 0
    assert second.now >= PATIENCE_S
    second.finish()

"""Sessions whose blocks stay in the cache while their agents wait for tools."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.kv.limits import GroupTierLimits, TierLimits
from arriero.shards.kv.retention import CacheHint, Retain
from support.fake_slice import FakeExecutor

VOCAB = 50
PAUSE_S = 30.0
POOLS = {
    "all": {},
    "chunked": {"attention_chunk": 16, "num_local_blocks": 40},
    "window": {"attention_window": 24, "attention_sinks": 2},
}


class Run:
    """A scheduler on a clock of the test's own, over a fake executor."""

    def __init__(self, *, tenant_share: float = 1.0, **changes: int) -> None:
        fields = {"num_blocks": 64, "max_sequences": 8, "max_batch_tokens": 64} | changes
        config = EngineConfig(
            max_model_len=128,
            block_size=4,
            vocab_size=VOCAB,
            eos_token_ids=(0, 1),
            tiers=GroupTierLimits(all=TierLimits(max_tenant_share=tenant_share)),
            **fields,
        )
        self.now_s = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now_s)
        self._executor = FakeExecutor(config)
        self._ids: Iterator[int] = iter(range(10**6))

    def ask(
        self, prompt: Sequence[int], *, tenant: str = "", hint: CacheHint | None = None
    ) -> tuple[int, list[int]]:
        """Cached tokens of the prompt, and the output."""
        params = SamplingParams(seed=1, max_tokens=6, ignore_eos=True)
        request = EngineRequest(
            request_id=f"r{next(self._ids)}",
            prompt=tuple(prompt),
            params=params,
            tenant=tenant,
            hint=hint,
        )
        self.scheduler.add(request)
        cached, output = 0, list[int]()
        while self.scheduler.num_live:
            while (plan := self.scheduler.schedule()) is not None:
                self._executor.submit(plan)
            result = self._executor.collect()
            assert result is not None, "stuck"
            for entry in self.scheduler.update(result):
                cached += entry.num_cached
                output += entry.tokens
        return cached, output

    def others(self, count: int, tenant: str = "others") -> None:
        """Traffic that would evict everything."""
        rng = random.Random(self.now_s)
        for _ in range(count):
            self.ask([rng.randrange(2, VOCAB) for _ in range(100)], tenant=tenant)


def session(seconds: float = 600.0, name: str = "s") -> CacheHint:
    return CacheHint(session=name, retain=(Retain(seconds=seconds),))


def prompt_of(length: int = 60) -> list[int]:
    return [2 + number % 40 for number in range(length)]


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("hinted", [False, True])
def test_a_conversation_stays_through_the_pauses_of_its_tools(pools: str, hinted: bool) -> None:
    run = Run(**POOLS[pools])
    talk, share = prompt_of(), []
    for _ in range(5):
        cached, output = run.ask(talk, tenant="agent", hint=session() if hinted else None)
        share.append(cached / len(talk))
        talk += [*output, 7, 8, 9]
        run.now_s += PAUSE_S
        run.others(6)
    assert share[0] == 0
    assert all((part > 0.75) is hinted for part in share[1:]), share


def test_retention_never_blocks_a_request() -> None:
    run = Run()
    for number in range(8):
        run.ask([number + 2] * 60, tenant="agent", hint=session(name=str(number)))
    cached, output = run.ask(list(range(2, 50)) * 2, tenant="others")
    assert not cached and len(output) == 6
    stats = run.scheduler.stats
    assert stats.blocks_used == 0 and stats.preemptions == 0


def test_a_released_session_and_an_expired_one_are_evicted_as_others() -> None:
    for hint, pause_s, releases in ((session(), 0.0, True), (session(20.0), PAUSE_S, False)):
        run = Run()
        run.ask(prompt_of(), tenant="agent", hint=hint)
        run.now_s += pause_s
        if releases:
            run.scheduler.release("agent", "other")
            run.scheduler.release("someone", "s")
            run.others(6)
            assert run.ask(prompt_of(), tenant="agent", hint=hint)[0] == 56
            run.scheduler.release("agent", "s")
        run.others(6)
        assert run.ask(prompt_of(), tenant="agent")[0] == 0


def test_a_breakpoint_keeps_a_beginning_longer() -> None:
    run = Run()
    hint = CacheHint(retain=(Retain(seconds=300.0), Retain(num_tokens=21, seconds=3600.0)))
    run.ask(prompt_of(), tenant="agent", hint=hint)
    run.now_s = 299.0
    run.others(6)
    assert run.ask(prompt_of(), tenant="agent")[0] == 56
    run.now_s = 3599.0
    run.others(6)
    assert run.ask(prompt_of(), tenant="agent")[0] == 20
    run.now_s = 3601.0
    run.others(6)
    assert run.ask(prompt_of(), tenant="agent")[0] == 0


def test_a_greedy_tenant_takes_its_share_and_no_more() -> None:
    run = Run(tenant_share=0.25)  # 16 of 64 blocks
    run.ask(prompt_of(), tenant="agent", hint=session())
    for number in range(20):
        run.ask([number + 2] * 60, tenant="greedy", hint=session(name=str(number)))
    run.others(3)
    assert run.ask(prompt_of(), tenant="agent")[0] == 56
    kept = [run.ask([number + 2] * 60, tenant="greedy")[0] for number in range(20)]
    assert sum(kept) <= 16 * 4


def test_samples_and_aborts_leave_nothing_behind() -> None:
    run = Run()
    for number in range(6):
        params = SamplingParams(seed=1, max_tokens=20, n=3, ignore_eos=True)
        prompt = tuple([number + 2] * 60)
        run.scheduler.add(
            EngineRequest(request_id=str(number), prompt=prompt, params=params, hint=session())
        )
        for _ in range(number):
            plan = run.scheduler.schedule()
            if plan is not None:
                run._executor.submit(plan)
                result = run._executor.collect()
                assert result is not None
                run.scheduler.update(result)
        run.scheduler.cancel(str(number))
    stats = run.scheduler.stats
    assert stats.blocks_used == 0 and stats.num_running == 0 == stats.num_waiting

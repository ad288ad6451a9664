"""Sessions that the device has no room for stay in host memory or on disk for their time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.kv.limits import GroupTierLimits, TierLimits
from arriero.shards.kv.retention import CacheHint, Retain
from support.fake_tiers import FaultyTiers

VOCAB, BLOCK = 50, 4
STAY_S = 600.0
OUTPUT = 5
LONGEST = 80
"""Most tokens of a session: 20 blocks, two sessions of which a tier of 120 blocks retains."""
TIERS = {
    "host": TierLimits(host_blocks=120, max_tenant_share=0.25),
    "disk": TierLimits(disk_blocks=120, max_tenant_share=0.25),
    "small host and disk": TierLimits(host_blocks=24, disk_blocks=120, max_tenant_share=0.25),
}


class Run:
    """A scheduler on a clock of the test's own, over tiers that work well."""

    def __init__(self, limits: TierLimits, **changes: int) -> None:
        fields = {"num_blocks": 40, "max_sequences": 4, "max_batch_tokens": 32} | changes
        config = EngineConfig(
            max_model_len=128,
            block_size=BLOCK,
            vocab_size=VOCAB,
            eos_token_ids=(0, 1),
            tiers=GroupTierLimits(all=limits, local=limits),
            **fields,
        )
        self.now_s = 0.0
        self.scheduler = Scheduler(config, clock=lambda: self.now_s)
        self._world = FaultyTiers(config, random.Random(0), 0.0)
        self._ids: Iterator[int] = iter(range(10**6))

    def ask(
        self, prompt: Sequence[int], *, tenant: str = "", hint: CacheHint | None = None
    ) -> tuple[int, list[int]]:
        """Cached tokens of the prompt, and the output; every copy is made before the end."""
        request = EngineRequest(
            request_id=f"r{next(self._ids)}",
            prompt=tuple(prompt),
            params=SamplingParams(seed=1, max_tokens=OUTPUT, ignore_eos=True),
            tenant=tenant,
            hint=hint,
        )
        self.scheduler.add(request)
        cached, output = 0, list[int]()
        for _ in range(1000):
            self.scheduler.apply_results(self._world.collect_transfers())
            plan = self.scheduler.schedule()
            if plan is not None:
                self._world.submit(plan)
            for batch in self.scheduler.take_transfers():
                self._world.transfer(batch)
            while self._world.work():
                pass
            result = self._world.collect()
            for entry in [] if result is None else self.scheduler.update(result):
                cached += entry.num_cached
                output += entry.tokens
            if not self.scheduler.num_live and not self.scheduler.num_transfers:
                break
        assert len(output) == OUTPUT, "stuck"
        return cached, output

    def others(self, rng: random.Random, count: int = 6, tenant: str = "others") -> None:
        """Requests without a hint."""
        for _ in range(count):
            self.ask(made_prompt(rng, 100), tenant=tenant)


def made_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def session(name: str = "s", seconds: float = STAY_S) -> CacheHint:
    return CacheHint(session=name, retain=(Retain(seconds=seconds),))


@pytest.mark.parametrize("limits", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("hinted", [False, True])
def test_a_session_pushed_out_of_the_device_stays_below(limits: TierLimits, hinted: bool) -> None:
    """Three sessions need 48 blocks of a device of 40, and others need 1,200 meanwhile."""
    rng = random.Random(1)
    run = Run(limits)
    talks = {name: made_prompt(rng, 60) for name in "abc"}
    for name, talk in talks.items():  # tenants of their own: each has a quarter of the tier
        _, output = run.ask(talk, tenant=name, hint=session() if hinted else None)
        talk += output
    for number in range(8):
        run.others(rng, tenant=f"others{number}")
    cached = [run.ask([*talk, 7], tenant=name)[0] for name, talk in talks.items()]
    assert cached == ([64, 64, 64] if hinted else [0, 0, 0])


@pytest.mark.parametrize("ending", ["expired", "released"])
def test_below_the_device_too_a_session_ends(ending: str) -> None:
    rng = random.Random(1)
    run = Run(TIERS["host"])
    prompt = made_prompt(rng, 60)
    run.ask(prompt, tenant="agent", hint=session(seconds=20.0))
    run.others(rng, 20)
    assert run.ask(prompt, tenant="agent", hint=session(seconds=20.0))[0] == 56
    if ending == "expired":
        run.now_s += 21.0
    else:
        run.scheduler.release("agent", "s")
    for number in range(8):
        run.others(rng, tenant=f"others{number}")
    assert run.ask(prompt, tenant="agent")[0] == 0


def test_a_tier_gets_back_what_it_evicted_before_the_hint() -> None:
    """A prompt that only the device still has is saved again once a request names it."""
    rng = random.Random(2)
    run = Run(TierLimits(host_blocks=40), num_blocks=120)
    prompt = made_prompt(rng, 60)
    run.ask(prompt, tenant="agent")
    run.others(rng, 3)  # 75 blocks: the tier of 40 has evicted the prompt, the device has not
    run.ask(prompt, tenant="agent", hint=session())
    counts = run.scheduler.stats.tiers
    run.others(rng, 8)
    assert counts["saved"] > 75 + 15
    assert run.ask(prompt, tenant="agent")[0] == 56


@pytest.mark.parametrize(
    "pools", [{"attention_chunk": 16, "num_local_blocks": 24}, {"attention_window": 24}]
)
def test_pools_of_local_attention_retain_as_well(pools: dict[str, int]) -> None:
    rng = random.Random(3)
    run = Run(TierLimits(host_blocks=120), **pools)
    prompt = made_prompt(rng, 60)
    run.ask(prompt, tenant="agent", hint=session())
    for number in range(8):
        run.others(rng, tenant=f"others{number}")
    assert run.ask(prompt, tenant="agent")[0] >= 52


@dataclass
class Agent:
    """An agent's conversation.

    Attributes:
        talk: prompt and output of the last turn.
        num_stored: tokens of `talk` in full blocks with computed keys and values.
        until_s: end of the time for which they stay.
    """

    talk: list[int] = field(default_factory=list)
    num_stored: int = 0
    until_s: float = 0.0


@settings(max_examples=20, deadline=None)
@given(
    limits=st.sampled_from(list(TIERS.values())),
    seed=st.integers(0, 2**32),
    actions=st.lists(
        st.sampled_from(["a", "b", "greedy", "others", "flood", "release", "pause"]),
        min_size=4,
        max_size=40,
    ),
)
def test_a_session_is_whole_for_its_time_whatever_others_send(
    limits: TierLimits, seed: int, actions: list[str]
) -> None:
    """Two agents within their shares find every block that an earlier turn left, until its time.

    Other tenants flood device and tiers meanwhile; one of them names more sessions than its share.
    """
    rng = random.Random(seed)
    run = Run(limits)
    agents = {"a": Agent(), "b": Agent()}
    greedy = 0
    for action in actions:
        if action in agents:
            agent = agents[action]
            if len(agent.talk) > LONGEST - 20:
                agent.talk, agent.num_stored = [], 0
            expected = agent.num_stored if run.now_s < agent.until_s else 0
            prompt = [*agent.talk, *made_prompt(rng, rng.randrange(1, 15))]
            cached, output = run.ask(prompt, tenant=action, hint=session())
            assert cached >= expected
            agent.talk = prompt + output
            agent.num_stored = (len(agent.talk) - 1) // BLOCK * BLOCK
            agent.until_s = run.now_s + STAY_S
        elif action == "greedy":
            greedy += 1
            run.ask(made_prompt(rng, 60), tenant="greedy", hint=session(str(greedy)))
        elif action == "flood":
            run.others(rng, 8, tenant=f"others{rng.randrange(6)}")
        elif action == "others":
            run.others(rng, 1)
        elif action == "release":
            name = rng.choice("ab")
            run.scheduler.release(name, "s")
            agents[name].until_s = 0.0
        else:
            run.now_s += rng.uniform(0, STAY_S)

"""Blocks of layers that see a part: those of chunk or window alone, all along a sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.errors import SpecError
from arriero.shards.protocol.step_plan import StepPlan, StepResult, int32

SIZE, CHUNK, LENGTH = 16, 64, 100_000


def long_config(**changes: int) -> EngineConfig:
    fields = {
        "max_model_len": LENGTH,
        "block_size": SIZE,
        "num_blocks": LENGTH // SIZE,
        "attention_chunk": CHUNK,
        "num_local_blocks": 64,
        "max_sequences": 2,
        "max_batch_tokens": 100,
        "vocab_size": 100,
    }
    return EngineConfig(**fields | changes)


def request(num_prompt: int, max_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id="long",
        prompt=(5,) * num_prompt,
        params=SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True),
    )


def local_blocks(plan: StepPlan) -> int:
    """The formula: from the chunk of the step's first token to the step's end."""
    start, end = int(plan.starts[0]), int(plan.starts[0] + plan.counts[0])
    return -(-end // SIZE) - start // CHUNK * (CHUNK // SIZE)


@pytest.mark.parametrize(
    ("num_prompt", "step_tokens", "num_new"),
    [(50_000, 100, 2_000), (90_000, 64, 2_000), (70_001, 999, 2_000), (3, 48, 2_997)],
)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_long_sequence_holds_what_the_formula_says(
    num_prompt: int, step_tokens: int, num_new: int, prefix_cache: bool
) -> None:
    scheduler = Scheduler(long_config(max_batch_tokens=step_tokens, prefix_cache=prefix_cache))
    scheduler.add(request(num_prompt, num_new))
    steps = 0
    while (plan := scheduler.schedule()) is not None:
        stats = scheduler.stats
        end = int(plan.starts[0] + plan.counts[0])
        assert stats.blocks_used == -(-max(end, num_prompt) // SIZE)
        assert stats.local_blocks_used == local_blocks(plan)
        assert stats.local_blocks_used <= (CHUNK + step_tokens) // SIZE + 1
        if plan.counts[0] == 1:
            assert stats.local_blocks_used <= CHUNK // SIZE, "what the planner counts"
        drawn = int32([7] * int(plan.samples.sum()))
        scheduler.update(StepResult(step=plan.step, tokens=drawn))
        steps += 1
    assert not scheduler.num_live
    assert steps >= num_new
    assert scheduler.stats.local_blocks_used == 0


WINDOW, SINKS = 90, 20


def windowed(**changes: int) -> EngineConfig:
    windows = {"attention_window": WINDOW, "attention_sinks": SINKS, "num_blocks": 40}
    return long_config(**{"attention_chunk": 0, "num_local_blocks": 0} | windows | changes)


def window_blocks(plan: StepPlan) -> int:
    """The formula: the sinks, and from what the first token of its block sees to the step's end."""
    start, end = int(plan.starts[0]), int(plan.starts[0] + plan.counts[0])
    first = max(0, start // SIZE * SIZE - WINDOW + 1) // SIZE
    return -(-end // SIZE) - first + min(-(-SINKS // SIZE), first)


@pytest.mark.parametrize(
    ("num_prompt", "step_tokens", "num_new"),
    [(50_000, 100, 2_000), (90_000, 64, 2_000), (70_001, 499, 2_000), (3, 48, 2_997)],
)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_window_bounds_what_a_long_sequence_holds(
    num_prompt: int, step_tokens: int, num_new: int, prefix_cache: bool
) -> None:
    config = windowed(max_batch_tokens=step_tokens, prefix_cache=prefix_cache)
    scheduler = Scheduler(config)
    scheduler.add(request(num_prompt, num_new))
    while (plan := scheduler.schedule()) is not None:
        stats, step = scheduler.stats, int(plan.counts[0])
        assert stats.blocks_used == window_blocks(plan)
        assert stats.blocks_used <= config.seen_blocks.most(LENGTH, step), "what is planned for"
        assert stats.local_blocks_used == stats.local_blocks_total == 0
        drawn = int32([7] * int(plan.samples.sum()))
        scheduler.update(StepResult(step=plan.step, tokens=drawn))
    assert not scheduler.num_live
    assert scheduler.stats.blocks_used == 0


def test_the_least_pool_takes_a_sequence_of_any_length_a_block_at_a_time() -> None:
    config = windowed(num_blocks=windowed().seen_blocks.most(LENGTH))
    scheduler = Scheduler(config)
    scheduler.add(request(5_000, 50))
    steps = 0
    while (plan := scheduler.schedule()) is not None:
        drawn = int32([7] * int(plan.samples.sum()))
        scheduler.update(StepResult(step=plan.step, tokens=drawn))
        steps += 1
    assert not scheduler.num_live and scheduler.stats.preemptions == 0
    assert steps - 50 <= 5_000 // SIZE + 1
    with pytest.raises(SpecError, match="one sequence's window of 90 and 20 sinks"):
        Scheduler(replace(config, num_blocks=config.num_blocks - 1))


def test_as_many_run_at_once_as_are_planned() -> None:
    """A pool for five windows and a step: five long sequences, none of them thrown out."""
    config = windowed(max_sequences=8, max_batch_tokens=96)
    blocks = 5 * config.seen_blocks.most(LENGTH) + 95 // SIZE + 1
    scheduler = Scheduler(replace(config, num_blocks=blocks, prefix_cache=False))
    for i in range(5):
        scheduler.add(replace(request(1_000 + i, 1_000), request_id=f"r{i}"))
    together = 0
    while (plan := scheduler.schedule()) is not None:
        together = max(together, scheduler.stats.num_running)
        drawn = int32([7] * int(plan.samples.sum()))
        scheduler.update(StepResult(step=plan.step, tokens=drawn))
    assert together == 5 and scheduler.stats.preemptions == 0


def test_a_prefix_hit_needs_the_window_and_the_sinks_alone() -> None:
    """A pool that has long evicted the middle of a prompt still finds it whole."""
    scheduler = Scheduler(windowed(num_blocks=24, max_batch_tokens=64))
    prompt = tuple(range(7)) * 300
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=2, ignore_eos=True)

    def serve(name: str, tokens: tuple[int, ...]) -> int:
        scheduler.add(EngineRequest(request_id=name, prompt=tokens, params=params))
        cached = 0
        while (plan := scheduler.schedule()) is not None:
            drawn = int32([7] * int(plan.samples.sum()))
            for one in scheduler.update(StepResult(step=plan.step, tokens=drawn)):
                cached += one.num_cached
        return cached

    assert serve("cold", prompt) == 0
    assert serve("again", prompt) == (len(prompt) - 1) // SIZE * SIZE
    assert serve("goes on", prompt + (1, 2, 3) * 20) == len(prompt) // SIZE * SIZE
    assert serve("other end", prompt[:-200] + (5,) * 200) == 2 * SIZE, "its sinks are left alone"

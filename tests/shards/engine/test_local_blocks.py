"""Blocks of chunk-local layers: exactly those of the chunk, at every step of a long sequence."""

from __future__ import annotations

import pytest

from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.plan import StepPlan, StepResult, int32
from arriero.shards.sampling import SamplingParams

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
    ("num_prompt", "step_tokens"), [(50_000, 100), (90_000, 64), (70_001, 999), (3, 48)]
)
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_long_sequence_holds_what_the_formula_says(
    num_prompt: int, step_tokens: int, prefix_cache: bool
) -> None:
    scheduler = Scheduler(long_config(max_batch_tokens=step_tokens, prefix_cache=prefix_cache))
    total = LENGTH if num_prompt > 3 else 3_000
    scheduler.add(request(num_prompt, total - num_prompt))
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
    assert steps >= total - num_prompt
    assert scheduler.stats.local_blocks_used == 0

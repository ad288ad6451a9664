"""Greedy tokens are transformers' own, whatever the layout, the batch and the cache.

`make test` runs a short form (fewer prompts, tokens and layers); `make oracle` all of it.
"""

from __future__ import annotations

import random
import time

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import running

SHORT, FULL = (7, 8), (32, 64)  # prompts, new tokens


SIZES = [
    pytest.param(SHORT, id="short"),
    pytest.param(FULL, id="full", marks=pytest.mark.slow),
]


def fp32(model_path: str, **more) -> GroupConfig:  # noqa: ANN003
    settings = {"num_blocks": 1024, "max_model_len": 1024, "max_sequences": 64} | more
    return GroupConfig(model_path=model_path, dtype="float32", **settings)


def greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, seed=0)


def pick(prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` of the prompts, spread over all lengths."""
    return [prompts[i * (len(prompts) - 1) // (count - 1)] for i in range(count)]


def assert_same(answers, expected) -> None:  # noqa: ANN001
    for i, (answer, tokens) in enumerate(zip(answers, expected, strict=True)):
        assert answer.error is None, answer.error
        assert answer.tokens == tokens, f"prompt {i} differs"
        assert answer.finish_reason == "length"


@pytest.mark.parametrize("size", SIZES)
def test_one_at_a_time(whole, prompts, oracle, size) -> None:  # noqa: ANN001
    """All layers, in the short form too."""
    count, new = size
    chosen = pick(prompts, count)
    expected = oracle(whole, chosen, new)
    with running(fp32(whole, prefix_cache=False)) as group:
        for prompt, tokens in zip(chosen, expected, strict=True):
            assert_same(group.generate([prompt], greedy(new)), [tokens])


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("size", SIZES)
def test_chunks(model_path, prompts, oracle, size, chunk) -> None:  # noqa: ANN001
    """All at once, with each chunk size."""
    count, new = size
    chosen = pick(prompts, count)
    expected = oracle(model_path, chosen, new)
    # a step's budget holds all decodes besides the chunk
    with running(fp32(model_path, max_batch_tokens=max(chunk, 64))) as group:
        assert_same(group.generate(chosen, greedy(new)), expected)
    if chunk < 64:
        config = fp32(model_path, max_batch_tokens=chunk, max_sequences=chunk)
        with running(config) as group:
            assert_same(group.generate(chosen, greedy(new)), expected)


@pytest.mark.parametrize("size", SIZES)
def test_random_arrivals(model_path, prompts, oracle, size) -> None:  # noqa: ANN001
    count, new = size
    chosen = pick(prompts, count)
    expected = oracle(model_path, chosen, new)
    rng = random.Random(1)
    order = list(range(count))
    rng.shuffle(order)
    with running(fp32(model_path)) as group:
        names = {}
        for i in order:
            names[i] = group.submit(chosen[i], greedy(new))
            time.sleep(rng.random() * 0.1)
        assert_same(group.wait([names[i] for i in range(count)]), expected)


@pytest.mark.parametrize("size", SIZES)
def test_preemption(model_path, prompts, oracle, size) -> None:  # noqa: ANN001
    """A cache so small that sequences are thrown out and computed again."""
    count, new = size
    chosen = pick(prompts, count)
    expected = oracle(model_path, chosen, new)
    longest = max(map(len, chosen)) + new
    blocks = -(-longest // 16) + 8
    with running(fp32(model_path, num_blocks=blocks, prefix_cache=False)) as group:
        assert_same(group.generate(chosen, greedy(new)), expected)
        if count == FULL[0]:
            assert group.engine.stats().preemptions > 0


@pytest.mark.parametrize("size", SIZES)
def test_prefix_cache_cold_and_warm(model_path, prompts, oracle, size) -> None:  # noqa: ANN001
    count, new = size
    chosen = pick(prompts, count)
    expected = oracle(model_path, chosen, new)
    with running(fp32(model_path)) as group:
        cold = group.generate(chosen, greedy(new))
        warm = group.generate(chosen, greedy(new))
        assert_same(cold, expected)
        assert_same(warm, expected)
        assert all(
            answer.num_cached == (len(prompt) - 1) // 16 * 16
            for answer, prompt in zip(warm, chosen, strict=True)
        )


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("size", SIZES)
def test_layouts(model_path, prompts, oracle, size, tp, pp) -> None:  # noqa: ANN001
    count, new = size
    chosen = pick(prompts, count)
    expected = oracle(model_path, chosen, new)
    with running(fp32(model_path, tp=tp, pp=pp, threads=1), spawn=True) as group:
        assert_same(group.generate(chosen, greedy(new)), expected)
        assert group.engine.stats().blocks_used == 0

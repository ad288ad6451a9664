"""The scheduler against a slice whose tokens depend on every block it reads."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.config.priorities import BACKGROUND_PRIORITY
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.sequence import sample_seed
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.types import EngineConfig, EngineRequest, SequenceOutput
from arriero.shards.errors import GroupFailed, InvalidRequest, Overloaded, SpecError
from arriero.shards.kv.retention import CacheHint, Retain
from arriero.shards.protocol.step_plan import StepResult, int32
from support.examples import examples
from support.fake_slice import FakeExecutor, answer

VOCAB = 50
HINTS = [
    CacheHint(session="s", retain=(Retain(seconds=0.001),)),
    CacheHint(session="s"),
    CacheHint(retain=(Retain(seconds=60.0), Retain(num_tokens=5, seconds=600.0))),
]


def make_config(**changes: object) -> EngineConfig:
    fields: dict[str, Any] = {
        "max_model_len": 64,
        "block_size": 4,
        "num_blocks": 64,
        "max_sequences": 8,
        "max_batch_tokens": 32,
        "vocab_size": VOCAB,
        "eos_token_ids": (0, 1),
    }
    return EngineConfig(**fields | changes)


def make_request(
    request_id: str,
    prompt: Iterable[int] = (5, 6, 7),
    **changes: Any,  # noqa: ANN401
) -> EngineRequest:
    names = ("priority", "resumed", "cache_salt", "tenant", "hint")
    outer = {k: changes.pop(k) for k in names if k in changes}
    params = SamplingParams(**{"seed": 7, "max_tokens": 8} | changes)
    return EngineRequest(request_id=request_id, prompt=tuple(prompt), params=params, **outer)


class Run:
    """Drives a scheduler against a fake executor and gathers what comes out."""

    def __init__(self, config: EngineConfig, proposers: ProposerFactory | None = None) -> None:
        self.config = config
        self.scheduler = Scheduler(config, proposers=proposers)
        self.executor = FakeExecutor(config)
        self.outputs: dict[tuple[str, int], list[SequenceOutput]] = defaultdict(list)

    def take(self, outputs: list[SequenceOutput]) -> None:
        for one in outputs:
            stream = self.outputs[one.request_id, one.index]
            assert not stream or stream[-1].finish_reason is None, "output after the end"
            stream.append(one)

    def submit(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.executor.submit(plan)
        return plan is not None

    def collect(self) -> bool:
        result = self.executor.collect()
        if result is not None:
            self.take(self.scheduler.update(result))
        return result is not None

    def finish(self, steps: int = 20000) -> None:
        for _ in range(steps):
            while self.submit():
                pass
            if not self.collect():
                break
        assert not self.scheduler.num_live, "stuck"
        assert not self.scheduler.num_outstanding
        assert self.scheduler.stats.blocks_used == 0
        assert self.scheduler.stats.local_blocks_used == 0
        assert self.scheduler.stats.num_running == 0
        assert self.scheduler.stats.num_waiting == 0

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [token for one in self.outputs[request_id, index] for token in one.tokens]

    def check(self, request: EngineRequest) -> None:
        """Every sample is what the definition says."""
        for index in range(request.params.n):
            stream = self.outputs[request.request_id, index]
            expected = answer(self.config, request, index)
            tokens = self.tokens(request.request_id, index)
            if stream[-1].finish_reason == "cancelled":
                assert tokens == expected.tokens[: len(tokens)]
                continue
            assert tokens == expected.tokens
            assert stream[-1].finish_reason == expected.finish_reason
            assert (stream[-1].stop_token is not None) == (expected.finish_reason == "stop")
            assert all(one.num_cached == 0 for one in stream[1:])
            if request.params.logprobs is not None:
                got = [row.logprob for one in stream for row in one.logprobs or ()]
                assert got == pytest.approx(expected.logprobs)
            rows = [one.prompt_logprobs for one in stream]
            assert all(one is None for one in rows[1:])
            if index == 0 and request.params.prompt_logprobs is not None:
                assert rows[0] is not None
                assert [one.logprob for one in rows[0]] == pytest.approx(expected.prompt_logprobs)
                assert [one.token for one in rows[0]] == list(request.prompt[1:])
            else:
                assert rows[0] is None


configs = st.builds(
    make_config,
    block_size=st.sampled_from([1, 3, 4]),
    num_blocks=st.integers(16, 40),
    max_sequences=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
    prefix_cache=st.booleans(),
    pipeline_depth=st.integers(1, 4),
    num_stages=st.integers(1, 3),
)


@st.composite
def chunked_configs(draw: st.DrawFn) -> EngineConfig:
    """With a chunk-local pool, from just enough for one sequence to plenty."""
    config = draw(configs)
    size = config.block_size
    chunk = size * draw(st.integers(1, 4))
    need = -(-min(chunk, config.max_model_len, config.num_blocks * size) // size)
    return replace(
        config, attention_chunk=chunk, num_local_blocks=need + draw(st.sampled_from([0, 1, 5, 30]))
    )


@st.composite
def windowed_configs(draw: st.DrawFn) -> EngineConfig:
    """With a window and sinks, from a pool just enough for one sequence to plenty."""
    config = draw(configs)
    config = replace(
        config,
        attention_window=draw(st.integers(1, 24)),
        attention_sinks=draw(st.sampled_from([0, 0, 1, 4, 9])),
    )
    need = config.seen_blocks.most(config.max_model_len)
    return replace(config, num_blocks=need + draw(st.sampled_from([0, 1, 5, 30])))


@settings(max_examples=examples(300), deadline=None)
@given(config=configs, seed=st.integers(0, 2**32))
def test_every_request_gets_its_own_tokens(config: EngineConfig, seed: int) -> None:
    drive(config, seed)


@settings(max_examples=examples(300), deadline=None)
@given(config=chunked_configs(), seed=st.integers(0, 2**32))
def test_and_does_with_a_chunk_local_pool(config: EngineConfig, seed: int) -> None:
    drive(config, seed)


@settings(max_examples=examples(150), deadline=None)
@given(config=windowed_configs(), seed=st.integers(0, 2**32))
def test_and_does_with_a_window(config: EngineConfig, seed: int) -> None:
    drive(config, seed)


def drive(config: EngineConfig, seed: int, proposers: ProposerFactory | None = None) -> None:
    """Random requests in random order, each against what it must give."""
    rng = random.Random(seed)
    run = Run(config, proposers)
    roots = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(2)]
    requests = []
    for number in range(rng.randint(1, 12)):
        head = rng.choice(roots)[: rng.randrange(20)]
        prompt = head + [rng.randrange(VOCAB) for _ in range(rng.randrange(6))] or [3]
        room = config.max_model_len
        if not config.attention_window:
            room = min(room, config.num_blocks * config.block_size + 1)
        prompt = prompt[: room - 1]
        most = min(rng.randint(1, 24), room - len(prompt))
        samples = rng.choice([1, 1, 1, 2, 3])
        resumed = [rng.randrange(2, VOCAB) for _ in range(rng.choice([0, 0, 3]))]
        if samples > 1 or len(resumed) >= most:
            resumed = []
        requests.append(
            make_request(
                f"r{number}",
                prompt,
                seed=rng.randrange(3),
                max_tokens=most,
                min_tokens=rng.choice([0, 0, rng.randint(0, most)]),
                stop_token_ids=rng.choice([(), (9, 10, 11)]),
                ignore_eos=rng.random() < 0.3,
                n=samples,
                logprobs=rng.choice([None, None, 0, 1]),
                prompt_logprobs=rng.choice([None, None, 0, 1]),
                presence_penalty=rng.choice([0.0, 1.0]),
                priority=rng.choice([0, 0, 1, -1, BACKGROUND_PRIORITY]),
                resumed=tuple(resumed),
                cache_salt=rng.choice([b"", b"", b"tenant"]),
                tenant=rng.choice(["", "a"]),
                hint=rng.choice([None, None, *HINTS]),
            )
        )
    pending = list(requests)
    while pending:
        action = rng.random()
        if action < 0.3:
            run.scheduler.add(pending.pop(0))
        elif action < 0.6:
            run.submit()
        elif action < 0.9:
            run.collect()
        elif action < 0.93:
            run.take(run.scheduler.cancel(rng.choice(requests).request_id))
        elif action < 0.95:
            run.scheduler.release(rng.choice(["", "a"]), rng.choice(["", "s"]))
    run.finish()
    for request in requests:
        run.check(request)


def test_pool_too_small_for_all_preempts_and_ends() -> None:
    config = make_config(num_blocks=12, max_sequences=8, prefix_cache=False)
    run = Run(config)
    requests = [
        make_request(f"r{i}", [i + 2] * 4, max_tokens=40, ignore_eos=True, seed=i) for i in range(6)
    ]
    for request in requests:
        run.scheduler.add(request)
    run.finish()
    assert run.scheduler.stats.preemptions > 0
    for request in requests:
        run.check(request)


def test_a_prompt_preempted_half_way_gives_its_logprobs_once() -> None:
    run = Run(make_config(num_blocks=8, max_batch_tokens=2, pipeline_depth=3))
    first = make_request("first", [4] * 4, max_tokens=28, ignore_eos=True)
    scored = make_request("scored", range(2, 22), max_tokens=3, prompt_logprobs=1)
    run.scheduler.add(first)
    for _ in range(2):
        run.submit()
        run.collect()
    run.scheduler.add(scored)
    run.finish()
    assert run.scheduler.stats.preemptions > 0
    run.check(first)
    run.check(scored)


def test_end_tokens_stop_only_after_min_tokens() -> None:
    scheduler = Scheduler(make_config(pipeline_depth=1))
    scheduler.add(make_request("r", min_tokens=2, stop_token_ids=(9,)))
    reasons = []
    for step, token in enumerate((0, 9, 9)):  # a sampler that forgets to ban
        assert scheduler.schedule() is not None
        (output,) = scheduler.update(StepResult(step=step, tokens=int32([token])))
        reasons.append((output.finish_reason, output.stop_token))
    assert reasons == [(None, None), (None, None), ("stop", 9)]


def test_a_long_prompt_is_cut_and_decodes_go_on_beside_it() -> None:
    run = Run(make_config(max_batch_tokens=8, pipeline_depth=1))
    run.scheduler.add(make_request("short", ignore_eos=True, max_tokens=30))
    run.submit()
    run.collect()
    run.scheduler.add(make_request("long", range(2, 42), ignore_eos=True))
    counts = []
    for _ in range(6):
        plan = run.scheduler.schedule()
        assert plan is not None
        counts.append(plan.counts.tolist())
        run.executor.submit(plan)
        run.collect()
    assert counts == [[1, 7]] * 5 + [[1, 5]]


def test_prefix_hits_leave_one_token_to_compute() -> None:
    run = Run(make_config())
    prompt = list(range(2, 18))  # four blocks to the token
    for name in ("first", "second"):
        run.scheduler.add(make_request(name, prompt))
        run.finish()
    assert run.outputs["first", 0][0].num_cached == 0
    assert run.outputs["second", 0][0].num_cached == 12
    assert run.tokens("first") == run.tokens("second")
    run.scheduler.add(make_request("other tenant", prompt, cache_salt=b"x"))
    run.scheduler.add(make_request("scored", prompt, prompt_logprobs=1))
    run.finish()
    assert run.outputs["other tenant", 0][0].num_cached == 0
    assert run.outputs["scored", 0][0].num_cached == 0
    assert len(run.outputs["scored", 0][0].prompt_logprobs or ()) == 15


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_samples_share_their_prompt(prefix_cache: bool) -> None:
    run = Run(make_config(prefix_cache=prefix_cache, pipeline_depth=1))
    request = make_request("r", range(2, 20), n=4, max_tokens=5)
    run.scheduler.add(request)
    plans = []
    while (plan := run.scheduler.schedule()) is not None:
        plans.append(plan)
        run.executor.submit(plan)
        run.collect()
    assert plans[0].counts.tolist() == [18]
    assert plans[1].counts.tolist() == [1, 2, 2, 2]
    run.finish()
    run.check(request)
    assert len({tuple(run.tokens("r", i)) for i in range(4)}) > 1
    assert [one.num_cached for (_, _), stream in run.outputs.items() for one in stream[:1]] == [
        0
    ] * 4


def test_lower_priority_goes_first_and_is_kept() -> None:
    run = Run(make_config(max_sequences=1))
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        run.scheduler.add(make_request(name, priority=priority))
    run.finish()
    assert [name for name, _ in run.outputs] == ["b", "c", "a"]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_decodes_run_ahead_of_their_results(depth: int) -> None:
    run = Run(make_config(pipeline_depth=depth))
    run.scheduler.add(make_request("r", ignore_eos=True))
    submitted = 0
    while run.submit():
        submitted += 1
    assert submitted == depth
    run.finish()
    assert len(run.tokens("r")) == 8
    assert run.executor.slice.step == 8, "a step past the end was planned"
    assert run.executor.slice.repeats == 6, "all but the prefill and the first decode repeat"


def test_stages_hold_one_micro_batch_each() -> None:
    run = Run(make_config(num_stages=3, max_sequences=6, max_batch_tokens=64))
    for i in range(6):
        run.scheduler.add(make_request(f"r{i}", [i + 2] * 3, ignore_eos=True, max_tokens=20))
    run.submit()
    run.collect()
    sizes, in_flight = [], []
    for _ in range(3):
        plan = run.scheduler.schedule()
        assert plan is not None
        run.executor.submit(plan)
        sizes.append(len(plan.slots))
        in_flight += plan.slots.tolist()
    assert sizes == [2, 2, 2]
    assert sorted(in_flight) == list(range(6))
    assert run.scheduler.schedule() is None
    run.finish()


def test_cancelling_frees_blocks_and_slot_at_once() -> None:
    run = Run(make_config(num_blocks=8, max_sequences=1, max_model_len=33))
    hog = make_request("hog", range(2, 20), max_tokens=14, ignore_eos=True)
    run.scheduler.add(hog)
    run.submit()
    run.submit()
    heir = make_request("heir", range(20, 38), max_tokens=14, seed=3)
    run.scheduler.add(heir)
    ended = run.scheduler.cancel("hog")
    assert [one.finish_reason for one in ended] == ["cancelled"]
    assert run.scheduler.stats.blocks_used == 0
    run.finish()
    assert run.tokens("hog") == [], "a late result of a cancelled request came out"
    run.check(heir)
    assert run.scheduler.cancel("hog") == []


def test_cancelling_ends_samples_that_never_began() -> None:
    run = Run(make_config(max_batch_tokens=4))
    run.scheduler.add(make_request("r", range(2, 12), n=3))
    run.submit()
    assert [one.index for one in run.scheduler.cancel("r")] == [0, 1, 2]
    run.finish()


def test_failure_ends_everything_with_the_cause() -> None:
    run = Run(make_config(max_sequences=1))
    for name in ("a", "b"):
        run.scheduler.add(make_request(name, n=2))
    run.submit()
    ended = run.scheduler.fail("slice 1 is lost")
    assert [(one.request_id, one.index) for one in ended] == [
        (name, index) for name in ("a", "b") for index in (0, 1)
    ]
    assert {one.error for one in ended} == {"slice 1 is lost"}
    assert {one.finish_reason for one in ended} == {"lost"}
    assert run.scheduler.stats.blocks_used == 0


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": ()}, "prompt", "empty"),
        ({"prompt": (5, VOCAB)}, "prompt", "50 at 1"),
        ({"prompt": (-1,)}, "prompt", "-1 at 0"),
        ({"prompt": (2**40,)}, "prompt", "token ids"),
        ({"prompt": [2] * 64, "max_tokens": 1}, "prompt", "at most 63"),
        ({"max_tokens": 62}, "max_tokens", "lower it to 61"),
        ({"max_tokens": None}, "max_tokens", "not set"),
        ({"seed": None}, "seed", "not set"),
        ({"n": 2, "resumed": (4,)}, "n", "one sample"),
        ({"resumed": (4,) * 8}, "resumed", "8 of `max_tokens`=8"),
        ({"stop_token_ids": (99,)}, "stop_token_ids", "99"),
    ],
)
def test_requests_that_could_never_run(changes: dict[str, Any], field: str, words: str) -> None:
    scheduler = Scheduler(make_config())
    with pytest.raises(InvalidRequest, match=words) as caught:
        scheduler.add(make_request("r", **changes))
    assert caught.value.field == field
    assert scheduler.num_live == 0


def test_a_request_larger_than_the_pool_is_refused_and_the_largest_runs() -> None:
    config = make_config(num_blocks=5, max_model_len=64)
    run = Run(config)
    with pytest.raises(InvalidRequest, match=r"KV pool.*lower it to 18"):
        run.scheduler.add(make_request("r", max_tokens=19))
    run.scheduler.add(largest := make_request("r", max_tokens=18, ignore_eos=True, n=2))
    run.finish()
    run.check(largest)


def test_the_same_id_twice_and_a_full_queue() -> None:
    scheduler = Scheduler(make_config(max_queued=2))
    scheduler.add(make_request("a"))
    with pytest.raises(InvalidRequest, match="runs already"):
        scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    with pytest.raises(Overloaded, match="max_queued") as caught:
        scheduler.add(make_request("c"))
    assert 0.1 <= caught.value.retry_after_s <= 60


@pytest.mark.parametrize("field", ["block_size", "num_blocks", "pipeline_depth", "num_stages"])
def test_configurations_that_cannot_be(field: str) -> None:
    with pytest.raises(SpecError, match=field):
        Scheduler(make_config(**{field: 0}))


@pytest.mark.parametrize(
    "result",
    [
        StepResult(step=1, tokens=int32([3])),
        StepResult(step=0, tokens=int32([3, 4])),
        StepResult(step=0, tokens=int32([VOCAB])),
        StepResult(step=0, tokens=int32([-2])),
    ],
)
def test_a_result_that_does_not_belong_is_a_failed_group(result: StepResult) -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("r"))
    assert scheduler.schedule() is not None
    with pytest.raises(GroupFailed, match="step"):
        scheduler.update(result)


def test_a_draw_with_nothing_left_ends_its_sequence_alone() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("doomed"))
    scheduler.add(make_request("fine"))
    assert scheduler.schedule() is not None
    doomed, fine = scheduler.update(StepResult(step=0, tokens=int32([-1, 3])))
    assert (doomed.tokens, doomed.finish_reason) == ((), "error")
    assert doomed.error is not None and "no token is left" in doomed.error
    assert (fine.tokens, fine.finish_reason) == ((3,), None)
    assert scheduler.stats.num_running == 1


def test_seeds_of_samples() -> None:
    seeds = [sample_seed(5, i) for i in range(128)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 128
    assert all(0 <= seed < 2**63 for seed in seeds)


def decode_step_us(num_sequences: int, steps: int = 400) -> tuple[float, float]:
    """Median microseconds of this thread's CPU time, of schedule and update in a steady decode."""
    config = make_config(
        max_model_len=4096,
        block_size=16,
        num_blocks=num_sequences * 64,
        max_sequences=num_sequences,
        max_batch_tokens=2048,
        vocab_size=128256,
    )
    scheduler = Scheduler(config)
    for i in range(num_sequences):
        # Staggered, so that each step sees some sequences cross a block boundary.
        prompt = [2 + i] * (17 + i % 16)
        scheduler.add(make_request(f"r{i}", prompt, max_tokens=900, ignore_eos=i % 2 == 0))
    tokens = np.full(num_sequences, 77, dtype=np.int32)
    spent: list[tuple[int, int]] = []
    plans = []
    for _ in range(steps):
        before = time.thread_time_ns()
        plan = scheduler.schedule()
        scheduled = time.thread_time_ns()
        if plan is not None:
            plans.append(plan)
        if len(plans) < 2:
            continue
        done = plans.pop(0)
        result = StepResult(step=done.step, tokens=tokens[: done.samples.sum()])
        begun = time.thread_time_ns()
        scheduler.update(result)
        spent.append((scheduled - before, time.thread_time_ns() - begun))
    schedule_us, update_us = np.median(np.asarray(spent[20:]), axis=0) / 1000
    return float(schedule_us), float(update_us)


@pytest.mark.parametrize(("num_sequences", "limit_us"), [(32, 1000), (256, 3000)])
def test_a_decode_step_is_cheap(num_sequences: int, limit_us: int) -> None:
    # Ten times what it takes on one quiet core: only a step that loops over tokens trips it.
    assert sum(decode_step_us(num_sequences)) < limit_us


def test_arrivals_of_one_class_start_in_order() -> None:
    run = Run(make_config(max_sequences=2, max_batch_tokens=5))
    for i in range(6):
        run.scheduler.add(make_request(f"r{i}", [i + 2] * 7))
    run.finish()
    order = [int(name[1:]) for name, _ in run.outputs]
    assert all(a < b for a, b in pairwise(order))

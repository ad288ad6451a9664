"""Speculative decoding in the engine: whatever is proposed, every request gets its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.types import EngineConfig, EngineRequest
from support.fake_slice import answer
from support.proposers import Outputs, peeking, sometimes, wrong

from .test_scheduler import (
    VOCAB,
    Run,
    chunked_configs,
    configs,
    drive,
    make_config,
    make_request,
    windowed_configs,
)


def outputs_of(config: EngineConfig) -> Outputs:
    """The outputs by the definition."""

    def outputs(sequence: Sequence) -> list[int]:
        request = sequence.live.request
        key = (request.request_id, sequence.index)
        if key not in known:
            known[key] = [*request.resumed, *answer(config, request, sequence.index).tokens]
        return known[key]

    known: dict[tuple[str, int], list[int]] = {}
    return outputs


KINDS: dict[str, Callable[[EngineConfig, int], ProposerFactory | None]] = {
    "ngram": lambda config, seed: None,
    "suffix": lambda config, seed: None,
    "peeking": lambda config, seed: peeking(outputs_of(config)),
    "wrong": lambda config, seed: wrong(outputs_of(config), VOCAB),
    "sometimes": lambda config, seed: sometimes(outputs_of(config), VOCAB, seed),
}


def with_drafts(config: EngineConfig, kind: str, most: int = 6) -> EngineConfig:
    name = "suffix" if kind == "suffix" else "ngram"
    return replace(config, speculation=SpeculationConfig(kind=name, max_tokens=most))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(
    config=st.one_of(configs, chunked_configs(), windowed_configs()),
    seed=st.integers(0, 2**32),
    most=st.sampled_from([1, 3, 6, 17]),
)
def test_every_request_gets_its_own_tokens(
    kind: str, config: EngineConfig, seed: int, most: int
) -> None:
    config = with_drafts(config, kind, most)
    drive(config, seed, KINDS[kind](config, seed))


def decoded(config: EngineConfig, kind: str, requests: list[EngineRequest]) -> Run:
    config = with_drafts(config, kind)
    run = Run(config, KINDS[kind](config, 1))
    for request in requests:
        run.scheduler.add(request)
    run.finish()
    for request in requests:
        run.check(request)
    return run


def test_right_drafts_save_steps() -> None:
    config = make_config(max_model_len=300, num_blocks=100)
    request = make_request("r", max_tokens=70, ignore_eos=True)
    run = decoded(config, "peeking", [request])
    assert run.scheduler.stats.steps < 25
    counts = run.scheduler.stats.speculation
    assert counts.accepted == counts.drafted > 50
    drafted = sum(output.num_drafted for output in run.outputs["r", 0])
    assert drafted == sum(output.num_accepted for output in run.outputs["r", 0]) == counts.drafted


def test_wrong_drafts_stop_soon() -> None:
    config = make_config(max_model_len=300, num_blocks=100)
    run = decoded(config, "wrong", [make_request("r", max_tokens=200, ignore_eos=True)])
    counts = run.scheduler.stats.speculation
    assert counts.accepted == 0 and counts.drafted < 60
    assert run.scheduler.stats.steps <= 203


def test_drafts_preempt_nobody() -> None:
    config = make_config(num_blocks=14, max_sequences=3, prefix_cache=False, max_batch_tokens=64)
    requests = [
        make_request(f"r{i}", [i + 2] * 4, max_tokens=12, ignore_eos=True, seed=i) for i in range(3)
    ]
    assert decoded(config, "peeking", requests).scheduler.stats.preemptions == 0

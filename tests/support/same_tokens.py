"""The same answers with and without speculation: parameters to ask with, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.sequence import Sequence as EngineSequence
from arriero.shards.engine.speculation.draft_length import StepCost
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.types import EngineRequest
from support.groups import Group, running
from support.proposers import peeking, sometimes, wrong

GRAMMAR = "start: /(def [a-z]+\\(\\):\\n    return [0-9]+\\n)+/"
WAIT_S = 900.0
"""Limit of a round; a limit of the test ends a group that stands still earlier."""
SAMPLED = {"temperature": 0.8, "seed": 11}


def variants(most: int) -> dict[str, SamplingParams]:
    """Sampling parameters, each with something that a drafted position must know."""
    greedy: dict[str, Any] = {"temperature": 0.0, "seed": 0, "max_tokens": most}
    sampled: dict[str, Any] = SAMPLED | {"max_tokens": most}
    return {
        "greedy": SamplingParams(**greedy, ignore_eos=True),
        "top_p": SamplingParams(**sampled, top_p=0.9, ignore_eos=True),
        "min_p": SamplingParams(**sampled, min_p=0.1, top_k=20),
        "repetition": SamplingParams(**greedy, repetition_penalty=1.2, ignore_eos=True),
        "penalties": SamplingParams(
            **sampled, presence_penalty=0.6, frequency_penalty=0.4, ignore_eos=True
        ),
        "bias": SamplingParams(
            **sampled, logit_bias={5: 2.0, 9: -50.0}, banned_token_ids=(12, 13), ignore_eos=True
        ),
        "stop": SamplingParams(**greedy, stop_token_ids=(10, 11, 20, 30), min_tokens=6),
        "logprobs": SamplingParams(**sampled, logprobs=3, prompt_logprobs=1, ignore_eos=True),
        "samples": SamplingParams(**sampled, n=2, ignore_eos=True),
    }


def grammar_variants(most: int) -> dict[str, SamplingParams]:
    """As `variants`, with outputs that a grammar bounds."""
    plain = variants(most)
    return {
        f"grammar {name}": replace(plain[name], grammar=GRAMMAR, ignore_eos=False)
        for name in ("greedy", "top_p", "repetition")
    }


@dataclass(frozen=True)
class Told:
    """All that a sample of a request gave."""

    tokens: list[int]
    logprobs: list[Any]
    finish_reason: str | None


Answers = dict[tuple[int, int], Told]
"""By number of the request and index of the sample."""


def ask(
    group: Group, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> Answers:
    """Every sample of every request, all at once."""
    names = [group.submit(p, one) for p, one in zip(prompts, params, strict=True)]
    group.wait(names, timeout_s=WAIT_S)
    return {
        (number, index): Told(
            (answer := group.answers[name, index]).tokens, answer.logprobs, answer.finish_reason
        )
        for number, (name, one) in enumerate(zip(names, params, strict=True))
        for index in range(one.n)
    }


def speculating(
    config: GroupConfig, kind: str, drafters: Mapping[str, str] | None = None, most: int = 7
) -> GroupConfig:
    """The config with drafts of a kind; `drafters` are the folders of "draft" and "eagle3"."""
    if drafters and kind in drafters:
        speculation = SpeculationConfig.checked(kind, most, drafters[kind])
    else:
        name = "suffix" if kind == "suffix" else "ngram"
        speculation = SpeculationConfig.checked(name, most)
    return replace(config, speculation=speculation)


def proposers_of(kind: str, expected: Answers, vocab_size: int) -> ProposerFactory | None:
    """The adversary of this name, which knows the expected outputs; None for a real source."""

    def outputs(sequence: EngineSequence) -> Sequence[int]:
        request: EngineRequest = sequence.live.request
        number = int(request.request_id[1:]) - 1
        tokens: list[int] = expected[number % count, sequence.index].tokens
        return tokens

    count = 1 + max(number for number, _ in expected)
    by_kind: dict[str, ProposerFactory] = {
        "peeking": peeking(outputs),
        "wrong": wrong(outputs, vocab_size),
        "sometimes": sometimes(outputs, vocab_size, 3),
    }
    return by_kind.get(kind)


@dataclass(frozen=True)
class Expected:
    """What a group without drafts answers.

    Attributes:
        answers: every sample.
        vocab_size: the model's.
    """

    answers: Answers
    vocab_size: int


def without_drafts(
    config: GroupConfig, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> Expected:
    """The answers of a group that drafts nothing."""
    with running(config) as group:
        answers = ask(group, prompts, params)
        vocab_size = group.engine.config.vocab_size
    assert any(len(told.tokens) > 4 for told in answers.values())
    return Expected(answers, vocab_size)


def compare(
    config: GroupConfig,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    kind: str,
    expected: Expected,
    *,
    rounds: int = 2,
    most: int = 7,
    drafters: Mapping[str, str] | None = None,
    inspect: Callable[[Group], None] = lambda group: None,
) -> None:
    """Compare a kind of drafts with none; later rounds find warm caches.

    Args:
        config: config of the group without drafts.
        prompts, params: the requests.
        kind: a kind of drafts, or the name of an adversary of `proposers_of`.
        expected: result of `without_drafts`.
        rounds: number of times that all requests are asked.
        most: most drafted tokens of a sequence in a step.
        drafters: folders of "draft" and "eagle3".
        inspect: further checks of the group, after all rounds.
    """
    factory = proposers_of(kind, expected.answers, expected.vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        if drafters and kind in drafters:  # these drafts may save no time, and shall be made
            patch.setattr(StepCost, "share", lambda *args: 0.0)
        with running(speculating(config, kind, drafters, most), proposers=factory) as group:
            for _ in range(rounds):
                assert ask(group, prompts, params) == expected.answers, kind
            counts = group.engine.stats().speculation
            assert counts.drafted > 0, f"{kind} drafted nothing"
            if kind == "wrong":
                assert counts.accepted == 0
            inspect(group)


def check(
    config: GroupConfig,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    kinds: Sequence[str],
    *,
    rounds: int = 2,
    drafters: Mapping[str, str] | None = None,
) -> None:
    """`compare` of several kinds."""
    expected = without_drafts(config, prompts, params)
    for kind in kinds:
        compare(config, prompts, params, kind, expected, rounds=rounds, drafters=drafters)

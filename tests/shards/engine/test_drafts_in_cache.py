"""Keys and values of rejected drafts never become cached blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.scheduler import Scheduler
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.speculation.proposer import ProposerFactory
from arriero.shards.engine.types import EngineConfig, EngineRequest
from arriero.shards.kv.blocks import chain_keys, root_key
from arriero.shards.kv.transfers import Pool
from arriero.shards.protocol.step_plan import int32
from support.fake_slice import answer
from support.proposers import Outputs, wrong, wrong_at_every

from .test_scheduler import VOCAB, Run, make_config, make_request

REQUESTS = [
    make_request(f"r{i}", [i + 2] * (3 + i), max_tokens=40, ignore_eos=True, seed=i)
    for i in range(4)
]


def often_right(outputs: Outputs) -> ProposerFactory:
    return wrong_at_every(outputs, VOCAB, 3)


def never_right(outputs: Outputs) -> ProposerFactory:
    return wrong(outputs, VOCAB)


class Watched(Run):
    """A run that compares each cached block with the tokens of its key, after each step."""

    def __init__(self, config: EngineConfig, proposers: ProposerFactory) -> None:
        super().__init__(config, proposers)
        self.stored: set[bytes] = set()
        self.scheduler = Scheduler(config, on_event=self.note, proposers=proposers)
        self.chains = [self.chain(request) for request in REQUESTS]

    def note(self, kind: str, key: bytes) -> None:
        if kind == "stored":
            self.stored.add(key)

    def chain(self, request: EngineRequest) -> tuple[list[int], list[bytes]]:
        """The tokens of a request with its answer, and the keys of their blocks."""
        tokens = [*request.prompt, *answer(self.config, request, 0).tokens]
        root = root_key(self.config.cache_salt, request.key_salt)
        return tokens, list(chain_keys(root, int32(tokens), self.config.block_size))

    def collect(self) -> bool:
        collected = super().collect()
        size = self.config.block_size
        pool = self.scheduler._blocks.pools[Pool.ALL]
        for tokens, keys in self.chains:
            for index, block in enumerate(pool.match(keys)):
                cached = [token for _, token in self.executor.slice.kv[block]]
                assert cached == tokens[index * size : (index + 1) * size]
        return collected


@pytest.mark.parametrize("block_size", [1, 4, 5])
@pytest.mark.parametrize("make", [often_right, never_right])
def test_cached_blocks_have_accepted_tokens_alone(
    block_size: int, make: Callable[[Outputs], ProposerFactory]
) -> None:
    config = make_config(
        block_size=block_size,
        num_blocks=400,
        speculation=SpeculationConfig(kind="ngram", max_tokens=7),
    )
    answers = {request.request_id: answer(config, request, 0).tokens for request in REQUESTS}

    def outputs(sequence: Sequence) -> list[int]:
        return answers[sequence.live.request.request_id]

    run = Watched(config, make(outputs))
    for request in REQUESTS:
        run.scheduler.add(request)
    run.finish()
    for request in REQUESTS:
        run.check(request)
    counts = run.scheduler.stats.speculation
    assert counts.drafted > counts.accepted
    keys = {key for _, chain in run.chains for key in chain}
    assert run.stored <= keys, "a key of tokens that were no part of an answer"
    num_prompt = sum(len(request.prompt) // block_size for request in REQUESTS)
    assert len(run.stored) > num_prompt, "blocks of the answers are cached too"


def test_a_later_request_reads_none_of_them() -> None:
    """Prompts that go on from an answer hit its blocks, and get their own tokens."""
    config = make_config(
        max_model_len=256,
        num_blocks=400,
        speculation=SpeculationConfig(kind="ngram", max_tokens=7),
    )
    known: dict[str, list[int]] = {}

    def outputs(sequence: Sequence) -> list[int]:
        return known[sequence.live.request.request_id]

    run = Run(config, often_right(outputs))
    turns = [list(REQUESTS[0].prompt)]
    for turn in range(3):
        request = make_request(f"t{turn}", turns[-1], max_tokens=30, ignore_eos=True, seed=turn)
        known[request.request_id] = answer(config, request, 0).tokens
        run.scheduler.add(request)
        run.finish()
        run.check(request)
        turns.append([*turns[-1], *known[request.request_id]])
    cached = [run.outputs[f"t{turn}", 0][0].num_cached for turn in range(3)]
    for num_cached, prompt in zip(cached[1:], turns[1:], strict=False):
        assert num_cached >= len(prompt) - 2 * config.block_size

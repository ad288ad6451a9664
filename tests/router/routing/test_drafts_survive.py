"""A slice is killed amid drafts, and another group goes on: the stream of a calm group."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer

from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.sequence import Sequence as EngineSequence
from arriero.shards.engine.types import SequenceOutput
from support.models import tiny_llama
from support.proposers import wrong_at_every

from .test_split import Group, ask, linked

VOCAB, NUM_TOKENS, KILLED_AFTER = 128, 80, 20
PROMPT = tuple(range(3, 60))
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=0)
DRAWN = SamplingParams(
    temperature=0.9, top_p=0.9, max_tokens=NUM_TOKENS, ignore_eos=True, seed=7, n=2
)
PARAMS = {"greedy": GREEDY, "drawn, two samples": DRAWN}


class Doomed(Group):
    """A group whose last slice is killed once it has given some tokens."""

    num_tokens = num_accepted = num_rejected = 0

    def take(self, outputs: Sequence[SequenceOutput]) -> None:
        """In the engine's thread: no step is planned between the last token and the death."""
        alive = self.num_tokens < KILLED_AFTER
        for output in outputs:
            self.num_tokens += len(output.tokens)
            self.num_accepted += output.num_accepted
            self.num_rejected += output.num_drafted - output.num_accepted
        if alive and self.num_tokens >= KILLED_AFTER:
            os.kill(self.pids[-1], signal.SIGKILL)
        super().take(outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama(path, layers=2, heads=4, kv_heads=2)
    return str(path)


def drafting(answers: list[list[int]]) -> dict[str, Any]:
    """Settings of a group whose drafts are mostly right; `answers` are known only later."""

    def outputs(sequence: EngineSequence) -> list[int]:
        """The answer that begins with the tokens of the sequence."""
        known = sequence.tokens[sequence.num_prompt :].tolist()
        fitting = [answer for answer in answers if answer[: len(known)] == known]
        return fitting[0] if len(fitting) == 1 else []

    return {
        "speculation": SpeculationConfig(kind="ngram", max_tokens=6),
        "proposers": wrong_at_every(outputs, VOCAB, 5),
    }


@pytest.mark.parametrize("second_drafts", [True, False], ids=["to drafts", "to none"])
async def test_a_killed_slice_changes_no_token(
    folder: str, llama_tokenizer: Tokenizer, second_drafts: bool
) -> None:
    answers: list[list[int]] = []
    async with linked([Group("calm", folder, llama_tokenizer, tp=2)]) as links:
        expected = {name: (await ask(links, PROMPT, params))[0] for name, params in PARAMS.items()}
    answers += [tokens for samples in expected.values() for tokens in samples]
    assert all(len(tokens) == NUM_TOKENS for tokens in answers)
    for name, params in PARAMS.items():
        first = Doomed("a", folder, llama_tokenizer, tp=2, **drafting(answers))
        settings = drafting(answers) if second_drafts else {}
        second = Group("b", folder, llama_tokenizer, tp=2, **settings)
        async with linked([first, second]) as links:
            got, progress = await ask(links, PROMPT, params)
            assert got == expected[name]
            assert progress.num_migrations >= 1
            assert first.num_accepted > 0 and first.num_rejected > 0
            drafts = second.engine.stats().speculation
            assert bool(drafts.accepted) == second_drafts

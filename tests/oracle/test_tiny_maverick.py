"""The trained mixture of experts in tests/assets: what it is, and that routing is learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import running
from support.oracle import greedy

FOLDER = Path(__file__).parents[1] / "assets" / "tiny-maverick"
MOST_BYTES = 12_000_000
TEXTS = (
    "Return a list of the",
    "def close(self):\n    ",
    "import os\nimport sys\n",
    "Raise an exception if the",
)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("dp", [1, 2])
def test_tokens_are_transformers_own(dp: int) -> None:
    import transformers

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, seed=0)
    config = GroupConfig(
        model_path=str(FOLDER), dtype="float32", num_blocks=128, max_sequences=8, threads=1, dp=dp
    )
    with running(config) as group:
        answers = group.generate(prompts, params)
        loads = group.engine.stats().expert_loads
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)

    def logits_of(tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 100
        with torch.inference_mode():
            assert answer.tokens == greedy(logits_of, prompt, answer.tokens)[0]
    if dp == 2:  # some experts are asked much more than others
        for one in loads.values():
            assert max(one) > 1.5 * np.mean(one)

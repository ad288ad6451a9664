"""Llama Guard 4's shape: a Llama 4 without experts and chunks, equal to transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.images.request import RequestImage
from support.groups import Group, running
from support.models import IMAGE_TOKEN, tiny_llama4
from support.oracle import greedy

NEW = 24
TOLERANCE = 2e-4
# as published: no experts, no routed layers, no chunks
GUARD: dict[str, Any] = {"experts": 0, "moe_step": 0, "top_k": 0, "chunk": None}
ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, seed=0, logprobs=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A prompt with transformers' greedy tokens and their log-probabilities [NEW, V]."""

    prompt: list[int]
    images: tuple[RequestImage, ...]
    tokens: list[int]
    rows: torch.Tensor


def config(folder: Path, **more: int) -> GroupConfig:
    settings = {"num_blocks": 128, "block_size": 8, "max_batch_tokens": 24, "max_sequences": 8}
    return GroupConfig(model_path=str(folder), dtype="float32", threads=1, **settings | more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guard")
    tiny_llama4(path, seed=4, sees=True, rope_scaling=ROPE, **GUARD)
    return path


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    """Two texts, one of several chunks if there were chunks, and two prompts with an image."""
    import transformers
    from oracle.test_llama4_images import laid_out, picture

    settings = transformers.AutoConfig.from_pretrained(folder)
    # transformers cannot run the published null: a chunk as long as the context is full attention
    settings.text_config.attention_chunk_size = settings.text_config.max_position_embeddings
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(
        folder, config=settings, dtype=torch.float32
    )
    text = [(7 * i + 3 * i * i) % 110 for i in range(90)]
    small, large = laid_out(picture(1, 40, 50)), laid_out(picture(2, 60, 100))
    prompts: list[tuple[list[int], tuple[RequestImage, ...], torch.Tensor | None]] = [
        (text[:5], (), None),
        (text, (), None),
        (text[:7] + small[0] + text[7:9], (small[1],), small[2]),
        (text[:40] + large[0] + text[:1], (large[1],), large[2]),
    ]
    with running(config(folder)) as group:
        names = [group.submit(prompt, PARAMS, images=images) for prompt, images, _ in prompts]
        drafts = [answer.tokens for answer in group.wait(names)]
    made = []
    for (prompt, images, tiles), draft in zip(prompts, drafts, strict=True):
        seen = {} if tiles is None else {"pixel_values": tiles}

        def logits_of(tokens: list[int], seen: dict[str, Any] = seen) -> torch.Tensor:
            ids = torch.tensor([tokens])
            logits: torch.Tensor = model(input_ids=ids, use_cache=False, **seen).logits[0]
            return logits

        with torch.inference_mode():
            tokens, rows = greedy(logits_of, prompt, draft)
        rows = rows.log_softmax(-1)
        made.append(Case(prompt=prompt, images=images, tokens=tokens, rows=rows))
    return made


def check(group: Group, cases: list[Case]) -> None:
    """Every token, and every log-probability that comes with it."""
    names = [group.submit(case.prompt, PARAMS, images=case.images) for case in cases]
    worst = 0.0
    for answer, case in zip(group.wait(names), cases, strict=True):
        assert answer.error is None, answer.error
        assert answer.tokens == case.tokens
        for position, row in zip(answer.logprobs, case.rows, strict=True):
            for token, value in [(position.token, position.logprob), *position.top]:
                worst = max(worst, abs(value - float(row[token])))
    assert worst < TOLERANCE


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}], ids=str)
def test_layouts(folder: Path, cases: list[Case], layout: dict[str, int]) -> None:
    assert all(IMAGE_TOKEN in case.prompt for case in cases if case.images)
    with running(config(folder, **layout)) as group:
        check(group, cases)
        assert group.engine.stats().local_blocks_used == 0


def test_text_alone(tmp_path: Path) -> None:
    """A text-only folder: 4 layers, the fourth without positions."""
    import transformers

    tiny_llama4(tmp_path, seed=6, **GUARD)
    settings = transformers.AutoConfig.from_pretrained(tmp_path)
    settings.attention_chunk_size = settings.max_position_embeddings
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, config=settings, dtype=torch.float32
    )
    prompt = [(11 * i) % 128 for i in range(40)]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, seed=0)
    with running(config(tmp_path)) as group:
        answer = group.generate([prompt], params)[0]

    def logits_of(tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    with torch.inference_mode():
        tokens, _ = greedy(logits_of, prompt, answer.tokens)
    assert answer.tokens == tokens

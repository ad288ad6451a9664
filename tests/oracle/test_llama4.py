"""Tiny seeded Llama 4 models: transformers' own logits and tokens, across many chunk boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.shards.group import GroupConfig
from arriero.shards.sampling import SamplingParams
from support.groups import Group, running
from support.models import tiny_llama4

CHUNK, NEW = 16, 200
TOLERANCE = 2e-4
EQUAL = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
SCOUT: dict[str, Any] = {"experts": 4, "rope_scaling": EQUAL}
MAVERICK: dict[str, Any] = {"experts": 16, "moe_step": 2, "qk_norm": False, "layers": 8}
MODELS: dict[str, dict[str, Any]] = {
    "scout": SCOUT,
    "maverick": MAVERICK,
    "two experts a token": {"experts": 8, "top_k": 2},
}
LENGTHS = (1, 15, 16, 17, 33, 70, 100)


@dataclass
class Case:
    """A model with transformers' greedy tokens and their logits, by prompt."""

    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[torch.Tensor]


_MADE: dict[str, Case] = {}


def case(name: str, root: pytest.TempPathFactory) -> Case:
    """Made once a session: the oracle takes seconds."""
    if name not in _MADE:
        path = root.mktemp(name.replace(" ", "-"))
        tiny_llama4(path, seed=5, **MODELS[name])
        prompts = [[(7 * i + 3 * j * j) % 128 for j in range(n)] for i, n in enumerate(LENGTHS)]
        tokens, logprobs = oracle(path, prompts)
        _MADE[name] = Case(path, prompts, tokens, logprobs)
    return _MADE[name]


def oracle(path: Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """One unpadded sequence at a time, with transformers' own cache."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens, logprobs = [], []
    with torch.inference_mode():
        for prompt in prompts:
            ids, cache, drawn, rows = torch.tensor([prompt]), None, [], []
            for _ in range(NEW):
                got = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = got.past_key_values
                rows.append(got.logits[0, -1].log_softmax(-1))
                drawn.append(int(rows[-1].argmax()))
                ids = torch.tensor([[drawn[-1]]])
            tokens.append(drawn)
            logprobs.append(torch.stack(rows))
    return tokens, logprobs


def group_config(path: Path, **more: Any) -> GroupConfig:  # noqa: ANN401
    settings: dict[str, Any] = {
        "dtype": "float32",
        "num_blocks": 512,
        "block_size": 8,
        "max_batch_tokens": 48,
        "max_sequences": 16,
        "threads": 1,
    }
    return GroupConfig(model_path=str(path), **settings | more)


def check(group: Group, made: Case) -> None:
    """All prompts at once: every token, and every log-probability that comes with it."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, seed=0, logprobs=4)
    answers = group.generate(made.prompts, params)
    worst = 0.0
    for answer, tokens, rows in zip(answers, made.tokens, made.logprobs, strict=True):
        assert answer.error is None, answer.error
        assert answer.tokens == tokens
        for one, row in zip(answer.logprobs, rows, strict=True):
            for token, value in [(one.token, one.logprob), *one.top]:
                worst = max(worst, abs(value - float(row[token])))
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_one_slice(name: str, kernels: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = case(name, tmp_path_factory)
    with running(group_config(made.path, kernels=kernels)) as group:
        check(group, made)


@pytest.mark.parametrize("step_tokens", [16, 24, 40, 256])
def test_prefill_cuts(step_tokens: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prefill cut on chunk boundaries, across them, and not at all."""
    made = case("maverick", tmp_path_factory)
    with running(group_config(made.path, max_batch_tokens=step_tokens)) as group:
        check(group, made)


@pytest.mark.parametrize(
    "layout", [{"tp": 2}, {"pp": 2}], ids=lambda one: "-".join(f"{k}{v}" for k, v in one.items())
)
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_several_slices(
    name: str, layout: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = case(name, tmp_path_factory)
    with running(group_config(made.path, **layout)) as group:
        check(group, made)

"""Tiny seeded Llama 4 models: transformers' own logits and tokens, across many chunk boundaries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.sampling_params import SamplingParams
from support.groups import Group, running
from support.models import tiny_llama4
from support.oracle import greedy

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
        with running(group_config(path)) as group:
            drafts = [answer.tokens for answer in group.generate(prompts, greedy_params(NEW))]
        tokens, logprobs = oracle(path, prompts, drafts)
        assert [len(each) for each in tokens] == [NEW] * len(prompts)
        _MADE[name] = Case(path, prompts, tokens, logprobs)
    return _MADE[name]


def greedy_params(new: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, seed=0)


def oracle(
    path: Path, prompts: list[list[int]], drafts: list[list[int]]
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Transformers' greedy tokens and log-probabilities [new, V], one sequence at a time."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def logits_of(tokens: list[int]) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    with torch.inference_mode():
        pairs = zip(prompts, drafts, strict=True)
        answers = [greedy(logits_of, prompt, draft) for prompt, draft in pairs]
    return [tokens for tokens, _ in answers], [rows.log_softmax(-1) for _, rows in answers]


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


def check(group: Group, made: Case, new: int = NEW) -> None:
    """All prompts at once: every token, and every log-probability that comes with it."""
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, seed=0, logprobs=4)
    answers = group.generate(made.prompts, params)
    worst = 0.0
    for answer, tokens, rows in zip(answers, made.tokens, made.logprobs, strict=True):
        assert answer.error is None, answer.error
        assert answer.tokens == tokens[:new]
        for one, row in zip(answer.logprobs, rows[:new], strict=True):
            for token, value in [(one.token, one.logprob), *one.top]:
                worst = max(worst, abs(value - float(row[token])))
    assert worst < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernels", [pytest.param("reference", marks=pytest.mark.slow), "cpu"])
def test_one_slice(name: str, kernels: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = case(name, tmp_path_factory)
    with running(group_config(made.path, kernels=kernels)) as group:
        check(group, made)


@pytest.mark.parametrize(
    "step_tokens",
    [pytest.param(16, marks=pytest.mark.slow), 24, 40, pytest.param(256, marks=pytest.mark.slow)],
)
def test_prefill_cuts(step_tokens: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prefill cut on chunk boundaries, across them, and not at all."""
    made = case("maverick", tmp_path_factory)
    with running(group_config(made.path, max_batch_tokens=step_tokens)) as group:
        check(group, made)


LAYOUTS: dict[str, dict[str, int]] = {
    "TP2 EP2": {"tp": 2},
    "TP2, columns of experts": {"tp": 2, "ep": 1},
    "PP2": {"pp": 2},
    "DP2 EP2": {"dp": 2},
    "TP4 EP4": {"tp": 4},
    "DP4 EP4": {"dp": 4},
    "TP2 DP2 EP4": {"tp": 2, "dp": 2},
    "PP2 DP2 EP2": {"pp": 2, "dp": 2},
    "PP2 TP2 EP2": {"pp": 2, "tp": 2},
}
SHORT = 80  # tokens over five boundaries of chunks
QUICK = [(layout, SHORT) for layout in ("TP2 EP2", "PP2", "DP2 EP2")]
WHOLE = [pytest.param(layout, NEW, marks=pytest.mark.slow) for layout in LAYOUTS]


@pytest.mark.parametrize(("layout", "new"), [*QUICK, *WHOLE])
@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_several_slices(
    name: str, layout: str, new: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = case(name, tmp_path_factory)
    with running(group_config(made.path, **LAYOUTS[layout])) as group:
        check(group, made, new)
        stats = group.engine.stats()
        assert stats.blocks_used == 0 and stats.local_blocks_used == 0


def test_a_prefix_is_found_inside_a_chunk(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hits that end inside a chunk, on its boundary, and where its local blocks are gone."""
    made = case("maverick", tmp_path_factory)
    prompt, tokens = made.prompts[-1], made.tokens[-1]
    params = greedy_params(NEW)
    with running(group_config(made.path)) as group:
        first = group.generate([prompt], params)[0]
        assert first.tokens == tokens and first.num_cached == 0
        text = prompt + tokens
        for cut in (105, 112, 119, 128, 130, 250):
            answer = group.generate([text[:cut]], replace(params, max_tokens=40))[0]
            assert answer.tokens == text[cut : cut + 40]
            assert answer.num_cached == (cut - 1) // 8 * 8
    # 20 local blocks are ten chunks: a long text drives the early ones out
    with running(group_config(made.path, num_local_blocks=20)) as group:
        group.generate([prompt], params)
        answer = group.generate([text[:60]], replace(params, max_tokens=40))[0]
        assert answer.tokens == oracle(made.path, [text[:60]], [answer.tokens])[0][0]
        assert answer.num_cached == 48, "the chunk's boundary, where no local block is needed"


@pytest.mark.parametrize("small", ["num_blocks", "num_local_blocks"])
def test_little_room(small: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Either pool too small for all: sequences wait, or leave and come back, and say the same."""
    made = case("maverick", tmp_path_factory)
    room = {"num_blocks": 60} if small == "num_blocks" else {"num_local_blocks": 5}
    with running(group_config(made.path, prefix_cache=False, **room)) as group:
        check(group, made)
        assert small != "num_blocks" or group.engine.stats().preemptions > 0


def test_fp8_on_the_wire(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Rows in eight bits: close to the oracle, step by step along its own tokens."""
    made = case("maverick", tmp_path_factory)
    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, prompt_logprobs=0)
    with running(group_config(made.path, dp=2, expert_wire="fp8")) as group:
        text = made.prompts[-1] + made.tokens[-1]
        answer = group.generate([text], params)[0]
    assert answer.error is None, answer.error
    far = [
        abs(one.logprob - float(row[one.token]))
        for one, row in zip(answer.prompt_logprobs[-NEW:], made.logprobs[-1], strict=True)
    ]
    assert TOLERANCE < sorted(far)[NEW // 2] < 0.1


def test_experts_move_between_steps(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Spare slots, a skewed load: experts are moved and copied, and every token stays the same."""
    made = case("maverick", tmp_path_factory)
    with running(group_config(made.path, dp=2, spare_experts=2)) as group:
        for _ in range(3):
            check(group, made)
        stats = group.engine.stats()
    assert stats.expert_moves > 0
    assert sorted(stats.expert_loads) == ["1", "3", "5", "7"]
    drawn = sum(len(one) for one in made.tokens) + sum(len(one) for one in made.prompts)
    assert max(map(sum, stats.expert_loads.values())) <= 3 * drawn
    assert 1.0 <= stats.expert_imbalance < 2.0

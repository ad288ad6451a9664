"""The same tokens with and without speculation, over sampling, layouts and kinds of drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.speculation import SpeculationConfig
from arriero.shards.engine.speculation.draft_length import StepCost
from support.groups import running
from support.models import tiny_llama
from support.same_tokens import ask, check, grammar_variants, variants

ASSETS = Path(__file__).parents[2] / "assets"
MAVERICK = str(ASSETS / "tiny-maverick")
CODE = "def area(width, height):\n    return width * height\n\n\n"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with random weights, which soon repeats itself."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(folder, seed=3)
    return str(folder)


def prompts_of(count: int, vocab_size: int) -> list[list[int]]:
    """Prompts that repeat themselves, each in its own way."""
    return [
        [(3 + i * 7 + j % (3 + i % 5) * 11) % vocab_size for j in range(6 + i)]
        for i in range(count)
    ]


LAYOUTS: dict[str, dict[str, Any]] = {
    "one slice": {},
    "TP2 unequal": {"tp": 2, "tp_shares": (3, 1)},
    "PP2": {"pp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_model_gives_the_same_tokens(dense: str, layout: str) -> None:
    config = GroupConfig(
        model_path=dense,
        dtype="float32",
        num_blocks=256,
        max_sequences=16,
        threads=1,
        **LAYOUTS[layout],
    )
    params = list(variants(24).values())
    kinds = ["ngram", "suffix", "sometimes"] if layout == "one slice" else ["sometimes"]
    check(config, prompts_of(len(params), 200), params, kinds)


def maverick(**settings: Any) -> GroupConfig:  # noqa: ANN401
    return GroupConfig(
        model_path=MAVERICK,
        dtype="float32",
        num_blocks=128,
        num_local_blocks=128,
        max_sequences=16,
        threads=1,
        **settings,
    )


def code_prompts(count: int) -> list[list[int]]:
    """Beginnings of Python files in tiny-maverick's tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{MAVERICK}/tokenizer.json")
    tails = ("def ", "import os\n", "class A:\n    ", "", "#")
    return [tokenizer.encode(CODE * (1 + i % 2) + tails[i % len(tails)]).ids for i in range(count)]


@pytest.mark.parametrize("layout", [{}, {"dp": 2}], ids=["one slice", "EP2"])
def test_experts_chunks_and_grammars_too(layout: dict[str, Any]) -> None:
    params = variants(24) | grammar_variants(24)
    kinds = ["sometimes", "ngram"] if not layout else ["sometimes"]
    check(maverick(**layout), code_prompts(len(params)), list(params.values()), kinds)


@pytest.mark.parametrize("kind", ["peeking", "wrong"])
def test_pre_emption_changes_nothing(dense: str, kind: str) -> None:
    config = GroupConfig(
        model_path=dense,
        dtype="float32",
        num_blocks=14,
        block_size=4,
        max_model_len=56,
        max_sequences=6,
        max_batch_tokens=24,
        threads=1,
    )
    params = list(variants(24).values())[:6]
    check(config, prompts_of(len(params), 120), params, [kind], rounds=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_drafts_for_itself(
    dense: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCost, "share", lambda *args: 0.0)  # such a draft saves no time
    config = GroupConfig(
        model_path=dense,
        dtype="float32",
        num_blocks=256,
        max_sequences=16,
        threads=1,
        **LAYOUTS[layout],
    )
    params = list(variants(24).values())
    prompts = prompts_of(len(params), 200)
    with running(config) as group:
        expected = ask(group, prompts, params)
    drafts = SpeculationConfig(kind="draft", max_tokens=5, model_path=dense)
    with running(replace(config, speculation=drafts)) as group:
        for _ in range(2):
            assert ask(group, prompts, params) == expected
        counts = group.engine.stats().speculation
        assert counts.accepted > counts.drafted / 2 > 0

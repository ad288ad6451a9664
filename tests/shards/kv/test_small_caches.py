"""A KV cache of a byte a number: equal tokens in every layout, batch and tier; keys of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.cluster.spec.model import KvSpec, ModelSpec
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.config.sampling_params import SamplingParams
from arriero.shards.errors import SpecError
from arriero.shards.layout.resolve import cache_salt, group_block_bytes, parts_of, resolve
from support.groups import running
from support.models import tiny_llama

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, seed=0)
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "TP2": {"tp": 2, "tp_shares": (1, 3)},
    "PP2": {"pp": 2},
    "chunks of 7": {"max_batch_tokens": 7, "max_sequences": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(path, max_positions=256)
    return path


def group_config(model: Path, **fields: Any) -> GroupConfig:  # noqa: ANN401
    defaults = {"dtype": "float32", "kv_dtype": "int8", "kernels": "cpu", "num_blocks": 64}
    return GroupConfig(model_path=str(model), threads=1, **(defaults | fields))


def prompts(model: Path) -> list[list[int]]:
    vocab = Checkpoint.open(model).config.vocab_size
    rng = np.random.default_rng(3)
    return [rng.integers(0, vocab, size).tolist() for size in (40, 3, 17)]


def tokens_of(config: GroupConfig, asked: list[list[int]]) -> list[list[int]]:
    with running(config) as group:
        return [answer.tokens for answer in group.generate(asked, GREEDY)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_chunks_give_the_same_tokens(model: Path, layout: str) -> None:
    asked = prompts(model)
    with running(group_config(model)) as group:
        alone = [group.generate([prompt], GREEDY)[0].tokens for prompt in asked]
        assert [answer.tokens for answer in group.generate(asked, GREEDY)] == alone
    assert tokens_of(group_config(model, **LAYOUTS[layout]), asked) == alone
    assert tokens_of(group_config(model, kernels="reference"), asked) == alone


def test_blocks_of_lower_tiers_are_the_same_bytes(model: Path) -> None:
    asked = prompts(model)[0]
    config = group_config(model, num_blocks=8, tiers=TierConfig(host_bytes=1 << 24))
    with running(config) as group:
        first = group.generate([asked], GREEDY)[0]
        for start in range(4):  # these take the blocks of the device
            group.generate([[start] * 48], GREEDY)
        again = group.generate([asked], GREEDY)[0]
        assert group.engine.stats().tiers["loaded"] > 0
    assert again.num_cached == 32 and again.tokens == first.tokens


@pytest.mark.parametrize("kind", ["ngram", "suffix"])
def test_drafts_change_no_token(model: Path, kind: str) -> None:
    from arriero.shards.config.speculation import SpeculationConfig

    asked = [[5, 6, 7, 8] * 6, prompts(model)[2]]
    plain = tokens_of(group_config(model), asked)
    drafted = group_config(model, speculation=SpeculationConfig(kind=kind))  # type: ignore[arg-type]
    assert tokens_of(drafted, asked) == plain


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_fp8_in_two_slices(model: Path, kernels: str) -> None:
    asked = prompts(model)
    config = group_config(model, kv_dtype="fp8", kernels=kernels)
    assert tokens_of(config, asked) == tokens_of(replace(config, tp=2), asked)


def test_keys_and_bytes_differ_by_type(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    small, plain = group_config(model), group_config(model, kv_dtype=None)
    fp8 = group_config(model, kv_dtype="fp8", kernels="reference")
    salts = {cache_salt(config, "digest") for config in (small, plain, fp8)}
    assert len(salts) == 3
    parts = parts_of(checkpoint.config, plain)
    sizes = [
        group_block_bytes(config, checkpoint.config, parts)[0] for config in (plain, small, fp8)
    ]
    head_dim = checkpoint.config.head_dim
    assert sizes[1] * 4 * head_dim == sizes[0] * (head_dim + 4)
    assert sizes[2] * 4 == sizes[0]


def test_what_cannot_be_is_refused(model: Path) -> None:
    config = Checkpoint.open(model).config
    packed = TierConfig(host_bytes=1 << 24, dtype="fp8")
    with pytest.raises(SpecError, match="remove `tier_dtype`"):
        resolve(group_config(model, tiers=packed), config)


def test_the_spec_sets_it() -> None:
    spec = ModelSpec(name="m", path="/m", kv=KvSpec(dtype="int8"))
    assert spec.group_config("cpu").cache_dtype == "int8"
    assert ModelSpec(name="m", path="/m").group_config("cpu").cache_dtype == "bfloat16"

"""Which models a window is refused for, in which words, and how many blocks it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CheckpointError, SpecError
from arriero.shards.kv.paging import SeenBlocks
from arriero.shards.layout.families import visible_keys
from arriero.shards.layout.parts import AnyModel
from arriero.shards.layout.resolve import resolve
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.llama4.config import Llama4Config
from support.models import llama4_settings

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def dense(**more: Any) -> ModelConfig:  # noqa: ANN401
    return ModelConfig.from_dict(LLAMA | more)


def asked(**more: Any) -> GroupConfig:  # noqa: ANN401
    return GroupConfig(model_path="", **more)


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        (dense(), {"sliding_window": 64}, "trained with full attention.*`changes_answers` to true"),
        (dense(), {"attention_sinks": 4}, "`attention_sinks`=4 needs `sliding_window`"),
        (dense(), {"sliding_window": 0}, "`sliding_window`=0 must be 1 to 512"),
        (dense(), {"sliding_window": 513}, "`sliding_window`=513 must be 1 to 512"),
        (
            dense(),
            {"sliding_window": 64, "attention_sinks": -1, "changes_answers": True},
            "`attention_sinks`=-1 must be 0 to 512",
        ),
        (dense(sliding_window=64), {}, "config.json says 64.*set `sliding_window` to 64"),
        (
            dense(sliding_window=64),
            {"sliding_window": 65},
            "trained with a window of 64 and no sinks",
        ),
        (
            dense(sliding_window=64),
            {"sliding_window": 64, "attention_sinks": 4},
            "trained with a window of 64 and no sinks",
        ),
        (
            Llama4Config.from_dict(llama4_settings()),
            {"sliding_window": 64, "changes_answers": True},
            "Llama 4 cannot have them",
        ),
    ],
)
def test_refusals(model: AnyModel, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        visible_keys(model, asked(**settings))


def test_what_is_served() -> None:
    assert visible_keys(dense(), asked()) == FULL_ATTENTION
    assert visible_keys(dense(sliding_window=64), asked(sliding_window=64)) == AttentionMaskSpec(
        window=64
    )
    meant = asked(sliding_window=64, attention_sinks=4, changes_answers=True)
    assert visible_keys(dense(), meant) == AttentionMaskSpec(window=64, sinks=4)
    assert visible_keys(dense(sliding_window=99), meant) == AttentionMaskSpec(window=64, sinks=4)
    llama4 = Llama4Config.from_dict(llama4_settings())
    assert visible_keys(llama4, asked()).chunk_size == llama4.attention_chunk_size


def test_windows_that_a_config_states() -> None:
    assert dense(sliding_window=None).sliding_window is None
    assert dense(sliding_window=64, use_sliding_window=False).sliding_window is None
    assert dense(sliding_window=64, use_sliding_window=True).sliding_window == 64
    both = ["sliding_attention"] * 2
    assert dense(sliding_window=64, layer_types=both).sliding_window == 64
    for wrong in (
        {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 64, "layer_types": ["full_attention"] * 2},
        {"layer_types": both},
        {"sliding_window": 64, "max_window_layers": 1},
        {"sliding_window": 0},
        {"sliding_window": "many"},
    ):
        with pytest.raises(CheckpointError, match=r"`(layer_types|max_window|sliding_window)"):
            dense(**wrong)


def test_a_pool_smaller_than_a_window_is_refused_before_anything_is_placed() -> None:
    config = asked(sliding_window=64, attention_sinks=4, changes_answers=True, num_blocks=5)
    with pytest.raises(SpecError, match=r"`sliding_window`=64 and `attention_sinks`=4.*least 6"):
        resolve(config, dense())


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 65])
@pytest.mark.parametrize("sinks", [0, 1, 16, 17])
@pytest.mark.parametrize("step", [1, 5, 16, 40])
def test_the_bound_is_what_a_sequence_may_hold_and_no_more(
    window: int, sinks: int, step: int
) -> None:
    """Against counting, token by token, what steps of any start see and write."""
    size, visible = 16, AttentionMaskSpec(window=window, sinks=sinks)
    seen = SeenBlocks(visible, size)
    most = 0
    for start in range(400):
        begun = start // size * size  # blocks are given back as a sequence comes to a new block
        read = set(range(visible.first(begun), start + step)) | set(range(min(sinks, start)))
        held = {position // size for position in read}
        assert held >= set(seen.numbers(start // size))
        most = max(most, len(held))
    assert seen.most(400 + step, step) == most

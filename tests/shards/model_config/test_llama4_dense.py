"""config.json of a Llama 4 without experts or without chunks, as of Llama Guard 4."""

from __future__ import annotations

from typing import Any

import pytest

from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import CheckpointError, SpecError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.moe import partition_moe
from arriero.shards.models.llama4.config import Llama4Config
from support.models import llama4_settings

NO_EXPERTS: dict[str, Any] = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "moe_layers": [],
    "interleave_moe_layer_step": 0,
    "attention_chunk_size": None,
}


def read(**changes: Any) -> Llama4Config:  # noqa: ANN401
    return Llama4Config.from_dict(llama4_settings() | changes)


def test_the_published_form() -> None:
    model = read(**NO_EXPERTS)
    assert (model.num_experts, model.top_k, model.moe_layers) == (0, 0, ())
    assert model.attention_chunk_size == 0
    family = family_of(model)
    assert family.experts(model) is None and family.chunked_layers(model) == ()
    assert not any(model.routes(layer) for layer in range(model.num_layers))
    assert {module.kind for module in family.modules(model, True)}.isdisjoint({"experts", "router"})


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layers": []},  # experts are counted, but no layer has any
        {"moe_layers": None, "num_local_experts": 0, "interleave_moe_layer_step": 0},
    ],
)
def test_other_spellings_of_no_experts(changes: dict[str, Any]) -> None:
    assert read(**changes).num_experts == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 0, "moe_layers": [0]}, "num_local_experts"),
        ({"moe_layers": None, "interleave_moe_layer_step": 0}, "interleave_moe_layer_step"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read(**changes)


def test_full_attention_by_layer_types() -> None:
    assert read(layer_types=["full_attention"] * 4).attention_chunk_size == 0
    own = ["chunked_attention"] * 3 + ["full_attention"]
    assert read(layer_types=own).attention_chunk_size == 16
    without = {k: v for k, v in llama4_settings().items() if k != "attention_chunk_size"}
    assert Llama4Config.from_dict(without).attention_chunk_size == 8192


def test_layouts_of_dense_layers() -> None:
    model = read(**NO_EXPERTS)
    parts = partition_moe(model, ParallelConfig(tp=2, pp=2))
    assert [part.experts.size for part in parts] == [0] * 4
    assert [part.columns.size for part in parts] == [48] * 4
    with pytest.raises(SpecError, match="a dense model has no experts to spread"):
        partition_moe(model, ParallelConfig(tp=1, dp=2))
    with pytest.raises(SpecError, match="use `tp`=1, or ask for unequal slices"):
        partition_moe(model, ParallelConfig(tp=3))
    with pytest.raises(SpecError, match="Layers are without positions"):
        family_of(model).attention_mask(model, GroupConfig(model_path="m", sliding_window=32))

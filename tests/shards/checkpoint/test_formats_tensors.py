"""Which tensors each form holds, at full size, and which bytes each rank reads of them."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arriero.cluster import cli
from arriero.cluster.planner.catalog import MODELS
from arriero.shards.checkpoint.formats.describe import read_settings
from arriero.shards.checkpoint.formats.quant_config import read_scheme
from arriero.shards.checkpoint.formats.stored import (
    Box,
    TensorSpec,
    box_elements,
    byte_ranges,
    bytes_read,
    reads,
    tensor_specs,
)
from arriero.shards.checkpoint.verify import verify
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span, partition
from arriero.shards.layout.moe import partition_moe
from arriero.shards.layout.parts import AnyPart
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.models.llama4.config import Llama4Config
from support.checkpoints_sparse import (
    LLAMA_405B,
    MAVERICK,
    SCOUT,
    llama_405b_awq,
    llama_405b_fp8,
    maverick_fp8,
    write_sparse,
)
from support.frontdoor import LLAMA_SPECIALS, make_tokenizer

FULL_SIZE: dict[str, tuple[dict[str, Any], int, int]] = {
    "405B bf16": (LLAMA_405B, 811_706_777_600, 126 * 9 + 3),
    "405B FP8": (llama_405b_fp8(), 487_229_259_776, 126 * 9 + 3 + 124 * 3),
    "405B AWQ": (llama_405b_awq(), 217_081_610_240, 126 * (2 + 7 * 3) + 3),
    "Maverick bf16": (MAVERICK, 803_167_562_752, 1061),
    "Maverick FP8": (maverick_fp8(), 416_752_626_688, 1061 - 24 * 2 + 24 * 128 * 6),
    "Scout bf16": (SCOUT, 217_283_587_072, 1133),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_folders_are_verified_in_seconds(tmp_path: Path, name: str) -> None:
    settings, nbytes, num_tensors = FULL_SIZE[name]
    write_sparse(tmp_path, settings)
    assert sum(one.stat().st_size for one in tmp_path.iterdir()) > nbytes
    assert sum(one.stat().st_blocks * 512 for one in tmp_path.iterdir()) < 200e6
    start = time.monotonic()
    report = verify(tmp_path)
    assert time.monotonic() - start < 10
    assert report.ok, report.problems[:3]
    assert (report.nbytes, report.num_tensors) == (nbytes, num_tensors)


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse(tmp_path, llama_405b_fp8())
    make_tokenizer(LLAMA_SPECIALS, bos="<|begin_of_text|>").save(str(tmp_path / "tokenizer.json"))
    assert cli.run(["models", "verify", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "fbgemm_fp8" in said and "487,229,259,776 bytes" in said
    assert cli.run(["models", "verify", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["num_tensors"] == 126 * 9 + 3 + 124 * 3
    victim = sorted(tmp_path.glob("*.safetensors"))[7]
    with victim.open("r+b") as stream:
        stream.truncate(victim.stat().st_size - 1)
    assert cli.run(["models", "verify", str(tmp_path)]) == 5
    said = capsys.readouterr().err
    assert victim.name in said and "truncated" in said and said.count("\n") == 1
    assert cli.run(["models", "verify", str(tmp_path / "gone")]) == 5


def test_a_missing_scale_is_found(tmp_path: Path) -> None:
    settings = llama_405b_fp8()
    settings["quantization_config"]["modules_to_not_convert"].remove("lm_head")
    write_sparse(tmp_path, llama_405b_fp8())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    problems = verify(tmp_path).problems
    assert len(problems) == 2
    assert any("lm_head.weight_scale" in one and "missing" in one for one in problems)
    assert any("lm_head.weight'" in one and "bfloat16" in one for one in problems)


# Names, against the library that writes such checkpoints.

TINY4: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "image_token_index": 90,
    "text_config": {
        "vocab_size": 96,
        "hidden_size": 40,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 6,
        "interleave_moe_layer_step": 2,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "no_rope_layers": [],
        "pad_token_id": 0,
        "attn_temperature_tuning": 4,
    },
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 20,
        "projector_input_dim": 20,
        "projector_output_dim": 20,
    },
}


@pytest.mark.parametrize("step", [1, 2])
def test_llama_4_names_are_those_that_transformers_has(step: int) -> None:
    from transformers import Llama4Config as TheirConfig
    from transformers import Llama4ForConditionalGeneration

    text = TINY4["text_config"] | {"interleave_moe_layer_step": step}
    text_theirs = text | {"attn_temperature_tuning": True, "no_rope_layers": None}
    config = TheirConfig(text_config=text_theirs, vision_config=TINY4["vision_config"])
    with torch.device("meta"):
        theirs = Llama4ForConditionalGeneration(config)
    model, scheme = read_settings(TINY4 | {"text_config": text})
    ours = {one.name: one.shape for one in tensor_specs(model, scheme)}
    assert ours == {name: tuple(one.shape) for name, one in theirs.state_dict().items()}
    assert model.num_parameters() == sum(math.prod(shape) for shape in ours.values())
    assert isinstance(model, Llama4Config)
    assert list(model.rope_layers) == [bool(one) for one in config.text_config.no_rope_layers]
    assert list(model.moe_layers) == config.text_config.moe_layers


def test_a_text_only_llama_4_has_no_prefix() -> None:
    text = TINY4["text_config"]
    model, scheme = read_settings(text | {"architectures": ["Llama4ForCausalLM"]})
    names = {one.name for one in tensor_specs(model, scheme)}
    assert "model.layers.1.feed_forward.experts.down_proj" in names
    assert not any(name.startswith(("language_model", "vision")) for name in names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"moe_layers": [1, 1]}, "moe_layers"),
        ({"moe_layers": [4]}, "moe_layers"),
        ({"no_rope_layers": [1, 1]}, "no_rope_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_temperature_tuning": "x"}, "attn_temperature_tuning"),
    ],
)
def test_llama_4_configs_that_cannot_be(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_settings(TINY4 | {"text_config": TINY4["text_config"] | change})


JUNK = (None, -1, 0, 1, 2**40, 1e400, "x", [], [[]], [None], {}, True)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_no_field_of_a_llama_4_config_breaks_more_than_its_own_check(part: str) -> None:
    for name in [*TINY4[part], "moe_layers", "rope_scaling", "rope_parameters", "head_dim"]:
        for value in JUNK:
            settings = TINY4 | {part: TINY4[part] | {name: value}}
            for scheme in (None, fbgemm([])):
                try:
                    model, form = read_settings(settings | {"quantization_config": scheme})
                    if model.num_parameters() < 10**7:
                        assert tensor_specs(model, form)
                except CheckpointError:
                    continue


def test_experts_without_end_are_not_listed() -> None:
    text = TINY4["text_config"] | {"num_local_experts": 65536, "num_hidden_layers": 4096}
    model, form = read_settings(TINY4 | {"text_config": text, "quantization_config": fbgemm([])})
    with pytest.raises(CheckpointError, match="not fused"):
        tensor_specs(model, form)


# What a quantization_config may say.


def test_ignore_lists_match_by_prefix_by_name_and_by_pattern() -> None:
    listed = ["lm_head", "model.layers.0", "re:.*self_attn", "re:^vision_model\\..*"]
    scheme = read_scheme({"quantization_config": fbgemm(listed)})
    assert scheme is not None
    kept = ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.7.self_attn.q_proj")
    for name in (*kept, "vision_model.patch_embedding.linear"):
        assert not scheme.covers(name, "mlp"), name
    for name in ("model.layers.10.mlp.up_proj", "model.layers.1.mlp.down_proj", "my_lm_head"):
        assert scheme.covers(name, "mlp"), name


def fbgemm(ignored: object) -> dict[str, Any]:
    return {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ignored}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("fp8", "an object"),
        (fbgemm("lm_head"), "a list"),
        (fbgemm([3]), "names"),
        (fbgemm(["re:(a+)+$"]), "pattern"),
        (fbgemm(["re:" + ".*a" * 40]), "pattern"),
        ({"quant_method": "awq", "bits": 3}, "bits"),
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "version"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -2}, "group_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "g": {
                        "targets": ["Linear"],
                        "weights": {"strategy": "tensor"},
                        "input_activations": {"num_bits": 4},
                    }
                },
            },
            "input_activations",
        ),
    ],
)
def test_forms_that_are_not_read(config: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_scheme({"quantization_config": config})


# Who reads what.


def dense(settings: dict[str, Any], **mesh: int) -> list[AnyPart]:
    model, _ = read_settings(settings)
    assert isinstance(model, ModelConfig)
    return list(partition(model, ParallelConfig(**mesh)))  # type: ignore[arg-type]


def routed(settings: dict[str, Any], **mesh: int) -> list[AnyPart]:
    model, _ = read_settings(settings)
    assert isinstance(model, Llama4Config)
    return list(partition_moe(model, ParallelConfig(**mesh)))  # type: ignore[arg-type]


PLANS: dict[str, tuple[dict[str, Any], list[AnyPart], int, int, float]] = {
    "405B bf16 TP8xPP2": (LLAMA_405B, dense(LLAMA_405B, tp=8, pp=2), 8, 1, 50.7),
    "405B FP8 TP8": (llama_405b_fp8(), dense(llama_405b_fp8(), tp=8), 8, 1, 60.9),
    "405B AWQ TP8": (llama_405b_awq(), dense(llama_405b_awq(), tp=8), 8, 1, 217.1 / 8),
    "405B bf16 TP16": (LLAMA_405B, dense(LLAMA_405B, tp=16), 16, 1, 51.3),  # K and V are read twice
    "Maverick FP8 EP8": (maverick_fp8(), routed(maverick_fp8(), tp=8), 8, 1, 48.3 + 3.8),
    "Maverick bf16 EP16": (MAVERICK, routed(MAVERICK, tp=8, dp=2), 8, 2, 48.3 + 3.8),
    "Scout bf16 EP8 by columns": (SCOUT, routed(SCOUT, tp=8, ep=1), 8, 1, 217.3 / 8),
    "Scout bf16 EP4xPP2": (SCOUT, routed(SCOUT, tp=4, pp=2), 4, 1, 217.3 / 8),
}


def due_reads(tensor: TensorSpec, tp: int, dp: int) -> int:
    """How often the mesh has each element of a tensor read."""
    if tensor.kind == "experts":
        return 1
    if not tensor.cuts:
        return tp * dp
    shared = tp // 8 if any(cut.axis == "kv_heads" for cut in tensor.cuts) and tp > 8 else 1
    return shared * dp


def coverage(shape: tuple[int, ...], boxes: list[Box]) -> set[int]:
    """How often the cells of a tensor are read: the set of counts over all cells."""
    edges = []
    for dim, size in enumerate(shape):
        cuts = {0, size} | {edge for box in boxes for edge in (box[dim].start, box[dim].stop)}
        edges.append(sorted(cuts))
    counts = set()
    for cell in itertools.product(*(range(len(one) - 1) for one in edges)):
        low = [edges[dim][i] for dim, i in enumerate(cell)]
        counts.add(
            sum(all(s.start <= at < s.stop for s, at in zip(b, low, strict=True)) for b in boxes)
        )
    return counts


@pytest.mark.parametrize("name", PLANS)
def test_every_byte_is_read_as_often_as_the_mesh_says(name: str) -> None:
    settings, parts, tp, dp, gb = PLANS[name]
    model, scheme = read_settings(settings)
    tensors = tensor_specs(model, scheme)
    seen: dict[tuple[object, ...], set[int]] = {}
    for tensor in tensors:
        boxes = [box for part in parts for box in reads(tensor, part)]
        key = (tensor.shape, tuple(boxes))
        if key not in seen:
            seen[key] = coverage(tensor.shape, boxes)
        assert seen[key] == {due_reads(tensor, tp, dp)}, tensor.name
    each = [bytes_read(tensors, part) for part in parts]
    print(name, "bytes of each rank:", *(f"{one:,}" for one in each))
    for one in each:
        assert one / 1e9 == pytest.approx(gb, rel=0.01 if "Scout" in name else 0.005)
    repeated = sum(one.nbytes * (due_reads(one, tp, dp) - 1) for one in tensors)
    assert sum(each) == sum(one.nbytes for one in tensors) + repeated


def test_an_expert_s_rank_reads_its_experts_alone() -> None:
    settings, parts, *_ = PLANS["Maverick FP8 EP8"]
    model, scheme = read_settings(settings)
    experts = [one for one in tensor_specs(model, scheme) if one.kind == "experts"]
    for part in parts:
        read = Counter(one.expert for one in experts if reads(one, part))
        first = part.rank * 16
        assert read == dict.fromkeys(range(first, first + 16), 24 * 6)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)),
            st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape)),
        )
    ),
    st.sampled_from([1, 2, 4]),
)
def test_byte_ranges_are_the_box(
    case: tuple[tuple[int, ...], tuple[tuple[int, int], ...]], itemsize: int
) -> None:
    shape, pairs = case
    box = tuple(Span(start=min(a, b - 1), stop=max(a + 1, b)) for a, b in pairs)
    flat = torch.arange(math.prod(shape)).view(shape)
    for dim, span in enumerate(box):
        flat = flat.narrow(dim, span.start, span.size)
    want = [7 + i * itemsize + k for i in flat.flatten().tolist() for k in range(itemsize)]
    ranges = list(byte_ranges(shape, itemsize, box, 7))
    assert [at for a, b in ranges for at in range(a, b)] == want
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert sum(b - a for a, b in ranges) == box_elements(box) * itemsize


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_has_its_parameters(name: str) -> None:
    model, scheme = read_settings(MODELS[name])
    total = sum(math.prod(one.shape) for one in tensor_specs(model, scheme))
    assert total == model.num_parameters()

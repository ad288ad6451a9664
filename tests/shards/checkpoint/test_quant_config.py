"""What `quantization_config` may say, against the library that writes it and against what is not
computed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.checkpoint.formats.names import ModuleNames
from arriero.shards.checkpoint.formats.quant_config import read_scheme
from arriero.shards.checkpoint.formats.scheme import QuantScheme
from arriero.shards.errors import CheckpointError
from support.models import tiny_llama
from support.quantized_models import quantized_llama

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
F8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def compressed(
    weights: dict[str, Any] | None,
    inputs: dict[str, Any] | None = None,
    **more: Any,  # noqa: ANN401
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    group |= more.pop("group", {})
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | more


def scheme(config: dict[str, Any]) -> QuantScheme:
    found = read_scheme({"quantization_config": config})
    assert found is not None
    return found


PACKED = QuantScheme(method="pack-quantized", bits=4, group_size=128)
FLOAT8 = QuantScheme(method="compressed-tensors", activation_bound=math.inf)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64}
AS_GPTQ = QuantScheme(method="gptq", group_size=64, zero_offset=1)
AS_AWQ = QuantScheme(method="awq", group_size=64)

A8 = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
MODELOPT = {"quant_method": "modelopt"}

SAME: dict[str, tuple[dict[str, Any], QuantScheme]] = {
    "actorder false": (compressed(W4 | {"actorder": False}), PACKED),
    "actorder static": (compressed(W4 | {"actorder": "static"}), PACKED),
    "actorder WEIGHT": (compressed(W4 | {"actorder": "WEIGHT"}), PACKED),
    "actorder true": (
        compressed(W4 | {"actorder": True}),
        QuantScheme(method="pack-quantized", bits=4, group_size=128, act_order=True),
    ),
    "actorder group": (
        compressed(W4 | {"actorder": "group"}),
        QuantScheme(method="pack-quantized", bits=4, group_size=128, act_order=True),
    ),
    "strategy left out": (compressed({"num_bits": 4, "group_size": 128}), PACKED),
    "numbers as floats": (compressed(W4 | {"num_bits": 4.0, "group_size": 128.0}), PACKED),
    "what changes nothing": (
        compressed(
            W4 | {"observer": "mse", "observer_kwargs": {}, "block_structure": None},
            quantization_status="frozen",
            sparsity_config={"format": "dense", "registry_requires_subclass": False},
            transform_config={},
            global_compression_ratio=1.5,
            version="0.9",
            kv_cache_scheme={"num_bits": 8, "type": "float"},
            format="pack-quantized",
        ),
        PACKED,
    ),
    "format of the group": (
        compressed(W4, group={"format": "pack-quantized"}, format="mixed-precision"),
        PACKED,
    ),
    "targets by name": (
        compressed(W4, group={"targets": ["re:.*mlp.*", "model.layers.0.self_attn.o_proj"]}),
        QuantScheme(
            method="pack-quantized",
            bits=4,
            group_size=128,
            targets=("re:.*mlp.*", "model.layers.0.self_attn.o_proj"),
        ),
    ),
    "two groups of one form": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"targets": ["re:.*self_attn.*"], "weights": W4},
                "b": {"targets": ["re:.*mlp.*"], "weights": W4},
            },
        },
        QuantScheme(
            method="pack-quantized",
            bits=4,
            group_size=128,
            targets=("re:.*self_attn.*", "re:.*mlp.*"),
        ),
    ),
    "KV cache as a group": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"targets": ["Linear"], "weights": F8, "input_activations": TOKEN},
                "b": {"targets": ["re:.*k_proj", "re:.*v_proj"], "output_activations": F8},
            },
        },
        FLOAT8,
    ),
    "FP8-dynamic": (compressed(F8, TOKEN, format="float-quantized"), FLOAT8),
    "naive": (compressed(F8, TOKEN, format="naive-quantized"), FLOAT8),
    "without quant_method": (
        {"config_groups": {"a": {"targets": ["Linear"], "weights": F8}}},
        QuantScheme(method="compressed-tensors"),
    ),
    "FP8 by tensor": (
        compressed(F8 | {"strategy": "tensor"}, TOKEN),
        QuantScheme(method="compressed-tensors", activation_bound=math.inf, per_tensor=True),
    ),
    "W8A16 in bytes": (
        compressed(F8 | {"type": "int"}, format="int-quantized"),
        QuantScheme(method="int-quantized"),
    ),
    "fp8 with static scales": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        QuantScheme(method="fp8", input_scale=True, per_tensor=True),
    ),
    "FP8 with static scales": (
        compressed(F8, TOKEN | {"dynamic": False, "strategy": "tensor"}),
        QuantScheme(method="compressed-tensors", input_scale=True),
    ),
    "W8A8": (
        compressed(F8 | {"type": "int"}, A8),
        QuantScheme(method="int-quantized", activation_bound=math.inf),
    ),
    "W8A8 with static scales": (
        compressed(
            F8 | {"type": "int"},
            A8 | {"dynamic": False, "strategy": "tensor"},
            format="int-quantized",
        ),
        QuantScheme(method="int-quantized", input_scale=True),
    ),
    "ModelOpt FP8": (
        {
            "config_groups": {"group_0": {"weights": {"num_bits": 8}, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
            "quant_algo": "FP8",
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.33.0"},
            "quant_method": "modelopt",
        },
        QuantScheme(method="modelopt-fp8", per_tensor=True, input_scale=True, ignored=("lm_head",)),
    ),
    "ModelOpt NVFP4": (
        MODELOPT | {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []},
        QuantScheme(method="modelopt-nvfp4", group_size=16, input_scale=True),
    ),
    "ModelOpt's object of hf_quant_config.json": (
        MODELOPT | {"producer": {}, "quantization": {"quant_algo": "w4a16_nvfp4"}},
        QuantScheme(method="modelopt-nvfp4", group_size=16),
    ),
    "fp8": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        QuantScheme(method="fp8", activation_bound=math.inf, per_tensor=True, ignored=("lm_head",)),
    ),
    "gptq, sym and more": (
        GPTQ
        | {
            "sym": True,
            "desc_act": False,
            "true_sequential": True,
            "damp_percent": 0.01,
            "checkpoint_format": "gptq",
            "quantizer": "x",
            "use_exllama": True,
        },
        AS_GPTQ,
    ),
    "gptq in Marlin's absence": (GPTQ | {"is_marlin_format": False, "lm_head": False}, AS_GPTQ),
    "gptq of some modules": (
        GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
        QuantScheme(
            method="gptq", group_size=64, zero_offset=1, targets=("self_attn.q_proj", "mlp.up_proj")
        ),
    ),
    "gptq with modules left out": (
        GPTQ | {"dynamic": {"-:.*down_proj": {}}},
        QuantScheme(method="gptq", group_size=64, zero_offset=1, ignored=("re:.*down_proj",)),
    ),
    "awq GEMM": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}, AS_AWQ),
    "awq Gemm": ({"quant_method": "awq", "group_size": 64, "version": "Gemm"}, AS_AWQ),
    "awq of 2023": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True},
        AS_AWQ,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_forms_that_are_read(name: str) -> None:
    config, due = SAME[name]
    assert scheme(config) == due


@pytest.mark.parametrize(
    "config", [None, {}, {"quant_method": "compressed-tensors", "format": "dense"}]
)
def test_no_quantization(config: dict[str, Any] | None) -> None:
    assert read_scheme({"quantization_config": config}) is None


def test_a_kv_cache_scheme_is_told_of() -> None:
    assert not scheme(compressed(W4)).notes
    for config in (compressed(W4, kv_cache_scheme={"num_bits": 8}), SAME["KV cache as a group"][0]):
        (note,) = scheme(config).notes
        assert "kv_cache_scheme" in note and "k_scale" in note


REFUSED: list[tuple[dict[str, Any], str]] = [
    (compressed(W4 | {"actorder": "random"}), "`actorder`='random'"),
    (compressed(W4 | {"num_bits": 3}), "`num_bits`=3"),
    (compressed(W4 | {"num_bits": 8}), "with strategy channel"),
    (compressed(F8 | {"strategy": "block"}, TOKEN), "`strategy`='block'"),
    (compressed(F8 | {"strategy": "group"}, TOKEN), "`strategy`='group'"),
    (compressed(W4, A8), "integer activations with packed weights .W4A8. are not supported"),
    (compressed(F8 | {"type": "int"}, A8 | {"symmetric": False}), "`symmetric`=False"),
    (compressed(F8 | {"type": "int"}, TOKEN, format="int-quantized"), "of `type` int"),
    (compressed(F8, TOKEN | {"dynamic": "local"}), "`dynamic`='local'"),
    (compressed(F8, TOKEN | {"dynamic": False}), "tensor where `dynamic` is false"),
    (MODELOPT, "`quant_algo`=None must be one of FP8, NVFP4, W4A16_NVFP4"),
    (MODELOPT | {"quant_algo": "MIXED_PRECISION"}, "`quant_algo`='MIXED_PRECISION'"),
    (MODELOPT | {"quant_algo": "NVFP4_AWQ"}, "`quant_algo`='NVFP4_AWQ'"),
    (MODELOPT | {"quant_algo": "NVFP4", "group_size": 32}, "`group_size`=32 must be 16"),
    (MODELOPT | {"quant_algo": "FP8", "exclude_modules": ["*a*b*c*d*e*"]}, "pattern"),
    (compressed(F8, TOKEN | {"strategy": "tensor"}), "`strategy`='tensor'"),
    (compressed(W4, format="nvfp4-pack-quantized"), "`format`='nvfp4-pack-quantized'"),
    (compressed(W4, sparsity_config={"format": "sparse-24-bitmask"}), "`sparsity_config`"),
    (compressed(W4, transform_config={"config_groups": {"R1": {}}}), "`transform_config`"),
    (compressed(W4, group={"output_activations": A8}), "`output_activations`"),
    (compressed(W4, group={"targets": ["re:(a+)+$"]}), "pattern"),
    (compressed(W4, group={"targets": []}), "`targets`"),
    (compressed(None), "`weights`=None must be an object"),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"targets": ["re:.*self_attn.*"], "weights": F8},
                "b": {"targets": ["re:.*mlp.*"], "weights": W4},
            },
        },
        "mixed forms are not supported",
    ),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "`weight_block_size`=.128, 128."),
    ({"quant_method": "fp8", "activation_scheme": "always"}, "`activation_scheme`='always'"),
    ({"quant_method": "awq", "version": "gemv"}, "`version`='gemv'"),
    ({"quant_method": "awq", "w_bit": 8}, "`w_bit`=8"),
    ({"quant_method": "awq", "zero_point": False}, "`zero_point`"),
    (GPTQ | {"bits": 8}, "`bits`=8"),
    (GPTQ | {"checkpoint_format": "marlin"}, "`checkpoint_format`='marlin'"),
    (GPTQ | {"is_marlin_format": True}, "`is_marlin_format`"),
    (GPTQ | {"lm_head": True}, "`lm_head`"),
    (GPTQ | {"dynamic": {"+:.*down": {"bits": 8}}}, "mixed widths"),
    ({"quant_method": "bitsandbytes"}, "use the plain checkpoint and set `quantization`"),
    ({"quant_method": None}, "`quant_method`=None must be one of"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED)
def test_forms_that_are_not_computed_are_refused_by_name(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_scheme({"quantization_config": config})


ARGUMENTS: list[dict[str, Any]] = [
    {"num_bits": 4, "group_size": 128},
    {"num_bits": 4, "group_size": -1},
    {"num_bits": 4, "strategy": "GROUP", "group_size": 32},
    {"num_bits": 4, "strategy": "channel", "group_size": None},
    W4 | {"actorder": None},
    W4 | {"actorder": "weight"},
    W4 | {"actorder": "static"},
    W4 | {"symmetric": False},
]


@pytest.mark.parametrize("weights", ARGUMENTS)
def test_defaults_are_those_of_compressed_tensors(weights: dict[str, Any]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    theirs = quantization.QuantizationArgs(**weights)
    ours = scheme(compressed(weights))
    assert ours.group_size == (theirs.group_size if theirs.strategy == "group" else 0)
    assert ours.symmetric == theirs.symmetric
    assert ours.act_order == (theirs.actorder == "group")


NAMES = [
    *(f"model.layers.{i}.self_attn.{one}_proj" for i in (0, 1, 11) for one in "qkvo"),
    *(f"model.layers.{i}.mlp.{one}_proj" for i in (0, 1, 11) for one in ("gate", "up", "down")),
    "lm_head",
]
LISTS = [
    ["lm_head"],
    ["re:.*lm_head"],
    ["re:lm_head$", "re:.*self_attn.*"],
    [r"re:model\.layers\.1\..*"],
    [r"re:.*\.(q|k|v)_proj$"],
    ["re:.*[qkv]_proj"],
    [r"re:model\.layers\.(0|11)\.mlp\.(gate|up)_proj"],
    [r"re:.*layers\.\d+\.mlp\.down_proj"],
    ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"],
    ["re:.*mlp.up_proj", "lm_head"],
    ["re:^.*(?:o_proj|down_proj)$"],
    [],
]


@pytest.mark.parametrize("listed", LISTS)
def test_lists_match_as_in_compressed_tensors(listed: list[str]) -> None:
    match = pytest.importorskip("compressed_tensors.utils.match")
    ours = scheme(compressed(W4, ignore=listed))
    for name in NAMES:
        due = any(match.match_name(name, one) for one in listed)
        assert ours.covers(name, "mlp") is not due, name


def test_stars_in_modelopt_names_stand_for_any_letters() -> None:
    listed = ["language_model.lm_head", "model.layers.0*", "*.o_proj"]
    listed += ["model.language_model.layers.1.mlp.up_proj"]
    ours = scheme(MODELOPT | {"quant_algo": "FP8", "exclude_modules": listed})
    plain = {name for name in NAMES if not ours.covers(name, "mlp")}
    assert plain == {
        "lm_head",
        *(name for name in NAMES if ".0." in name),
        *(name for name in NAMES if name.endswith("o_proj")),
        "model.layers.1.mlp.up_proj",
    }
    assert not ours.covers("language_model.model.layers.0.self_attn.q_proj", "attention")
    assert not ours.covers("model.layers.5.router", "router")


def test_a_quantized_kv_cache_alone_is_plain() -> None:
    config = MODELOPT | {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert read_scheme({"quantization_config": config}) is None


def test_parts_of_names_stand_for_what_is_in_them() -> None:
    listed = ModuleNames(("self_attn", "model.layers.1", "mlp.gate"))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "x.mlp.gate"):
        assert listed.match(name)
    for name in ("model.layers.11.mlp.up_proj", "model.layers.0.mlp.gate_proj", "my_self_attn"):
        assert not listed.match(name)


@pytest.mark.parametrize(
    ("form", "file", "settings"),
    [
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}),
        (
            "awq",
            "quant_config.json",
            {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
        ),
    ],
)
def test_settings_in_a_file_of_their_own(
    tmp_path: Path, form: str, file: str, settings: dict[str, Any]
) -> None:
    """As AutoGPTQ and AutoAWQ wrote them before config.json held them."""
    from arriero.shards.checkpoint.verify import verify

    quantized_llama(tmp_path, form, layers=1)
    _, due = describe(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(tmp_path)[1] is None
    assert not verify(tmp_path).ok
    (tmp_path / file).write_text(json.dumps(settings))
    assert describe(tmp_path)[1] == due
    report = verify(tmp_path)
    assert report.ok and report.form == form
    (tmp_path / file).write_text(json.dumps(settings | {"note": 1}))
    assert verify(tmp_path).digest != report.digest
    (tmp_path / file).write_text(json.dumps({"bits": 3, "w_bit": 3}))
    with pytest.raises(CheckpointError, match=rf"{file}: `(bits|w_bit)`=3"):
        describe(tmp_path)
    tiny_llama(tmp_path / "plain")
    assert describe(tmp_path / "plain")[1] is None

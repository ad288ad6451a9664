"""The planner's figures, against published totals and against what slices really allocate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from arriero.cluster import cli
from arriero.cluster.planner import step_memory
from arriero.cluster.planner.catalog import (
    DEVICES,
    MODELS,
    NamedModel,
    cpu,
    device,
    find_model,
)
from arriero.cluster.planner.checkpoint_bytes import stored_bytes
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.group_plan import GroupPlan
from arriero.cluster.planner.layouts import Machines, rank_layouts
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.step_memory import num_graphs
from arriero.cluster.planner.weight_forms import ON_LOAD, Dtype, weights_as
from arriero.kernels import registry
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.ops import Ops
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.registry import BACKENDS, Kernels
from arriero.kernels.select import ops_for
from arriero.kernels.sizes import KvBlockSize, MatrixSize, Precision
from arriero.shards.checkpoint.formats.describe import describe
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.errors import ArrieroError, SpecError
from arriero.shards.layout.families import parts_of
from arriero.shards.layout.resolve import resolve
from arriero.shards.worker.runner import Runner
from support import triton_interpreter
from support.models import tiny_llama, tiny_llama4, tiny_qwen3
from support.processes import spawn_group
from support.quantized_models import fused_llama4, quantized_llama

H100 = DEVICES["h100-80g"]
SMOLLM2 = os.environ.get("ARRIERO_TEST_MODEL", "")
needs_smollm2 = pytest.mark.skipif(
    not (Path(SMOLLM2) / "config.json").is_file(), reason="no $ARRIERO_TEST_MODEL"
)


def group(
    name: str, dtype: Dtype, layout: ParallelConfig | None = None, context: int = 8192, **more: int
) -> GroupPlan:
    model = find_model(name)
    weights = weights_as(model.config, model.scheme, dtype)
    demand = KvDemand(context=context, **more)
    return plan_group(model, weights, layout or ParallelConfig(), demand, H100, "triton")


# Totals in GB: embeddings, head and norms bfloat16.
TOTALS: list[tuple[str, Dtype, float]] = [
    ("llama-3.1-8b", "bfloat16", 16.1),
    ("llama-3.1-8b", "fp8", 9.1),
    ("llama-3.1-8b", "int4", 5.7),
    ("llama-3.1-70b", "bfloat16", 141.1),
    ("llama-3.3-70b", "fp8", 72.7),
    ("llama-3.1-70b", "int4", 39.8),
    ("llama-3.1-405b", "bfloat16", 811.7),
    ("llama-3.1-405b", "fp8", 410.1),
    ("llama-3.1-405b", "fp8-shipped", 487.2),
    ("llama-3.1-405b", "int4", 217.1),
    ("llama-4-scout", "bfloat16", 217.3),
    ("llama-4-scout", "fp8", 111.6),
    ("llama-4-scout", "fp8-shipped", 120.6),
    ("llama-4-scout", "int4", 60.8),
    ("llama-4-maverick", "bfloat16", 803.2),
    ("llama-4-maverick", "fp8", 404.5),
    ("llama-4-maverick", "fp8-shipped", 416.6),
    ("llama-4-maverick", "int4", 213.0),
    ("qwen3-8b", "bfloat16", 16.4),
    ("qwen3-8b", "fp8", 9.4),
    ("qwen3-32b", "bfloat16", 65.5),
    ("qwen3-32b", "fp8", 34.3),
]


@pytest.mark.parametrize(("name", "dtype", "gb"), TOTALS)
def test_totals_of_weights(name: str, dtype: Dtype, gb: float) -> None:
    plan = group(name, dtype, context=1)
    stored = stored_bytes(plan.model.config, plan.weights)
    assert stored is not None
    # the table rounds to 0.1 GB
    assert stored / 1e9 == pytest.approx(gb, rel=0.005, abs=0.05)
    if dtype != "int4":
        assert plan.ranks[0].weights.total / 1e9 == pytest.approx(gb, rel=0.005, abs=0.05)


def test_int4_takes_more_in_memory_than_on_disk() -> None:
    """The backends keep a group's scale and zero as float32: 8 bytes, where files take 2.5."""
    plan = group("llama-3.1-405b", "int4")
    stored = stored_bytes(plan.model.config, plan.weights)
    assert stored is not None
    groups = (405_853_388_800 - 2 * 128256 * 16384 - 253 * 16384) // 128
    assert plan.ranks[0].weights.total - stored == pytest.approx(groups * 5.5, rel=0.001)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-4-scout", 108_641_793_536),
        ("llama-4-maverick", 401_583_781_376),
        ("llama-guard-4-12b", 12_001_097_216),
        ("smollm2-135m", 134_515_008),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_parameters(name: str, count: int) -> None:
    assert find_model(name).config.num_parameters() == count


GIB_A_SEQUENCE = {
    "llama-3.1-8b": {1024: 0.125, 16384: 2, 131072: 16},
    "llama-3.1-70b": {1024: 0.313, 16384: 5, 131072: 40},
    "llama-3.1-405b": {1024: 0.492, 16384: 7.875, 131072: 63},
    "llama-4-scout": {1024: 0.188, 16384: 1.875, 131072: 7.125, 2**20: 49.1, 10 * 2**20: 481.1},
}


@pytest.mark.parametrize("name", GIB_A_SEQUENCE)
def test_kv_of_one_sequence(name: str) -> None:
    plan = group(name, "bfloat16")
    for context, gib in GIB_A_SEQUENCE[name].items():
        got = plan.sequence_bytes(plan.ranks[0], context) / 2**30
        assert got == pytest.approx(gib, rel=0.005), context


def test_kv_of_llama_4_is_part_global_and_part_capped() -> None:
    rank = group("llama-4-maverick", "bfloat16").ranks[0]
    assert (rank.kv_global_block // 16, rank.kv_local_block // 16) == (49_152, 147_456)
    plan = group("llama-4-maverick", "bfloat16")
    long, longer = (plan.sequence_bytes(rank, n) for n in (8192, 16384))
    assert longer - long == 8192 * 49_152
    assert 8192 * 147_456 == 1.125 * 2**30


def test_a_window_caps_what_a_sequence_takes() -> None:
    full = group("llama-3.1-8b", "bfloat16", context=131072)
    window = {"sliding_window": 4096, "attention_sinks": 4}
    capped = group("llama-3.1-8b", "bfloat16", context=131072, **window)
    rank = capped.ranks[0]
    # the window of 256 blocks lies over 257, and the sinks take one
    assert capped.sequence_bytes(rank, 131072) == 258 * rank.kv_block
    assert capped.sequence_bytes(rank, 1000) == full.sequence_bytes(full.ranks[0], 1000)
    blocks = capped.pool_bytes(rank) // rank.kv_block
    assert full.concurrency(131072) == blocks // 8192
    assert capped.concurrency(131072) == (blocks - 128) // 258  # a step's 2048 tokens aside
    assert capped.concurrency(1000) == full.concurrency(1000)
    assert capped.ranks == full.ranks


def test_405b_over_two_machines() -> None:
    plan = group("llama-3.1-405b", "bfloat16", ParallelConfig(tp=8, pp=2))
    assert len(plan.ranks) == 16
    for rank in plan.ranks:
        assert rank.weights.total / 1e9 == pytest.approx(50.7, rel=0.005)
        assert rank.kv_block // 16 == 32_256
    assert plan.shortfall() is None


def test_405b_fp8_as_shipped_leaves_this_for_kv_on_one_machine() -> None:
    plan = group("llama-3.1-405b", "fp8-shipped", ParallelConfig(tp=8))
    for rank in plan.ranks:
        assert rank.weights.total / 1e9 == pytest.approx(60.9, rel=0.005)
        assert 15e9 < rank.kv_pool_bytes < 21e9
    assert plan.shortfall() is None
    # one block more is the graphs' own
    assert plan.pool_tokens == plan.ranks[0].kv_pool_bytes // 64_512 - 16


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("fp8-shipped", ParallelConfig(tp=8, ep=8)), ("bfloat16", ParallelConfig(tp=8, dp=2, ep=16))],
)
def test_maverick_by_experts(dtype: Dtype, layout: ParallelConfig) -> None:
    plan = group("llama-4-maverick", dtype, layout)
    for rank in plan.ranks:
        experts = rank.weights.by_kind["experts"]
        assert experts / 1e9 == pytest.approx(48.3, rel=0.005)
        rest = rank.weights.total - experts - rank.weights.scales
        assert f"{rest / 1e9:.1f}" == "3.8"


def test_maverick_at_tp16_cannot_be_cut_evenly() -> None:
    with pytest.raises(SpecError, match=r"cannot be cut evenly: 40 query heads % 16 = 8"):
        group("llama-4-maverick", "bfloat16", ParallelConfig(tp=16))
    shares = tuple([3.0, 2.0] * 8)
    plan = group("llama-4-maverick", "bfloat16", ParallelConfig(tp=16, tp_shares=shares))
    assert {rank.part.q_heads.size for rank in plan.ranks} == {3, 2}


def test_a_shortfall_names_rank_and_bytes() -> None:
    plan = group("llama-3.1-405b", "bfloat16", ParallelConfig(tp=8))
    why = plan.shortfall()
    assert why is not None and "rank 0 (stage 0)" in why and "GB short" in why
    missing_bytes = plan.missing_bytes()
    demand = replace(plan.demand, reserve_bytes=plan.ranks[0].reserve)
    for more, fits in ((missing_bytes, True), (missing_bytes - 1, False)):
        roomy = replace(H100, memory_bytes=H100.memory_bytes + more)
        again = plan_group(plan.model, plan.weights, plan.layout, demand, roomy, "triton")
        assert (again.shortfall() is None) == fits


def test_spare_experts_are_counted() -> None:
    layout = ParallelConfig(tp=8, ep=8)
    without = group("llama-4-maverick", "fp8-shipped", layout)
    with_two = group("llama-4-maverick", "fp8-shipped", layout, spare_experts=2)
    one = 24 * 3 * 5120 * 8192 + 24 * 4 * (2 * 8192 + 5120)
    for a, b in zip(without.ranks, with_two.ranks, strict=True):
        assert b.spare_experts == 2 * one
        assert a.room - b.room == 2 * one


def test_float8_needs_a_device_that_has_it() -> None:
    model = find_model("llama-3.1-70b")
    weights = weights_as(model.config, None, "fp8")
    with pytest.raises(SpecError, match=r"needs compute capability 8\.9 or newer; a100"):
        plan_group(
            model, weights, ParallelConfig(tp=8), KvDemand(context=1), DEVICES["a100-80g"], "triton"
        )


def test_ranked_layouts_all_fit_and_the_rest_say_why() -> None:
    machines = Machines(gpu="h100-80g", nodes=2, per_node=8)
    model = find_model("llama-4-maverick")
    options = rank_layouts(model, machines, KvDemand(context=8192), "triton", ["bfloat16"])
    works = [one for one in options if one.why_not is None]
    rest = [one for one in options if one.why_not is not None]
    assert options == works + rest and works and rest
    assert [one.tokens_per_s for one in works] == sorted(
        (one.tokens_per_s for one in works), reverse=True
    )
    assert all(one.plan is not None and one.plan.shortfall() is None for one in works)
    assert any(one.layout == ParallelConfig(tp=8, dp=2, ep=16) for one in works)
    assert any(one.layout == ParallelConfig(tp=8, pp=2, ep=1) for one in works)
    assert any("40 query heads % 16" in (one.why_not or "") for one in rest)
    assert all(one.why_not for one in rest)


# What slices really allocate.

LAYOUTS = {
    "TP1": (1, 1),
    "TP2": (2, 1),
    "TP3": (3, 1),
    "PP2": (1, 2),
    "PP3": (1, 3),
    "TP3xPP2": (3, 2),
}


def check_group(config: GroupConfig, kernels: Kernels, *, spawn: bool = False) -> None:
    """The plan's bytes are those of the ranks: loaded here one by one, or in their processes."""
    model, scheme = describe(config.model_path)
    config = resolve(config, model)
    if spawn:
        executor = spawn_group(config)
        try:
            held = [(one.weights_bytes, one.kv_bytes) for one in executor.wait_ready(120)]
        finally:
            executor.close()
    else:
        runners = (Runner(config, rank) for rank in range(config.world_size))
        held = [(one.weights_nbytes, one.kv_nbytes) for one in runners]
    dtype: Dtype = "float32" if config.dtype == "float32" else "bfloat16"
    if config.quantization is not None:
        dtype = ON_LOAD[config.quantization]
    elif scheme is not None:
        dtype = "checkpoint"
    plan = plan_group(
        NamedModel(name="it", config=model, scheme=scheme),
        weights_as(model, scheme, dtype),
        ParallelConfig(tp=config.tp, pp=config.pp),
        KvDemand(context=1, kv_dtype=config.cache_dtype, num_blocks=config.num_blocks),
        cpu(1 << 36, config.world_size),
        kernels,
    )
    assert held == [(one.weights.total, one.kv_pool_bytes) for one in plan.ranks]


@needs_smollm2
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_smollm2_allocates_what_was_planned(
    layout: str, quantization: str | None, kernels: Kernels
) -> None:
    backend(kernels)
    tp, pp = LAYOUTS[layout]
    config = GroupConfig(
        model_path=SMOLLM2,
        quantization=quantization,
        tp=tp,
        pp=pp,
        kernels=kernels,
        threads=1,
        kv_bytes=20_000_000,
    )
    check_group(config, kernels)


@needs_smollm2
@pytest.mark.parametrize(
    ("kernels", "kv_dtype"),
    [("reference", "int8"), ("reference", "fp8"), ("cpu", "int8"), ("cpu", "fp8")],
)
def test_small_kv_caches_are_planned_to_the_byte(
    kernels: Kernels, kv_dtype: Literal["int8", "fp8"]
) -> None:
    backend(kernels)
    config = GroupConfig(
        model_path=SMOLLM2,
        tp=3,
        pp=2,
        kernels=kernels,
        kv_dtype=kv_dtype,
        threads=1,
        kv_bytes=20_000_000,
    )
    check_group(config, kernels)


@needs_smollm2
def test_slices_report_what_was_planned() -> None:
    config = GroupConfig(
        model_path=SMOLLM2, pp=2, kernels="reference", threads=1, kv_bytes=20_000_000
    )
    check_group(config, "reference", spawn=True)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize(
    "form",
    [
        "awq",
        "gptq",
        "packed-4",
        "packed-4-zeros",
        "packed-8",
        "compressed-fp8",
        "compressed-fp8-tensor",
        "fp8-tensor",
        "int8-tensor",
        "int8-channel-static",
        "fbgemm_fp8",
        "modelopt-fp8",
        "modelopt-nvfp4",
    ],
)
def test_a_quantized_folder_allocates_what_was_planned(
    tmp_path: Path, form: str, tp: int, kernels: Kernels
) -> None:
    backend(kernels)
    quantized_llama(tmp_path, form, layers=1)
    check_group(small_group(tmp_path, tp, kernels), kernels)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("form", ["modelopt-fp8", "modelopt-nvfp4"])
def test_fused_experts_allocate_what_was_planned(
    tmp_path: Path, form: str, kernels: Kernels
) -> None:
    backend(kernels)
    fused_llama4(tmp_path, form)
    for tp in (1, 2):
        check_group(small_group(tmp_path, tp, kernels), kernels)


def small_group(path: Path, tp: int, kernels: Kernels) -> GroupConfig:
    return GroupConfig(
        model_path=str(path),
        dtype="float32",
        tp=tp,
        kernels=kernels,
        threads=1,
        num_blocks=4,
        max_model_len=64,
    )


@pytest.mark.parametrize("form", ["gptq-act-order", "packed-4-group"])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_columns_in_an_order_of_their_own_are_planned(
    tmp_path: Path, kernels: Kernels, form: str
) -> None:
    """Exactly where they are whole, and not too little where they are cut."""
    backend(kernels)
    quantized_llama(tmp_path, form, layers=1)
    check_group(small_group(tmp_path, 1, kernels), kernels)
    model = find_model(str(tmp_path))
    weights = weights_as(model.config, model.scheme, "checkpoint")
    plan = plan_group(model, weights, ParallelConfig(tp=2), KvDemand(context=64), H100, kernels)
    config = resolve(small_group(tmp_path, 2, kernels), model.config)
    for rank in plan.ranks:
        held = Runner(config, rank.part.rank).weights_nbytes
        assert held <= rank.weights.total < 1.5 * held


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 1), (2, 2)])
def test_a_biased_model_allocates_what_was_planned(
    tmp_path: Path, kernels: Kernels, tp: int, pp: int
) -> None:
    backend(kernels)
    tiny_llama(
        tmp_path,
        layers=3,
        hidden=72,
        intermediate=104,
        heads=6,
        kv_heads=3,
        vocab=131,
        attention_bias=True,
        mlp_bias=True,
    )
    check_group(
        GroupConfig(
            model_path=str(tmp_path),
            dtype="float32",
            tp=tp,
            pp=pp,
            kernels=kernels,
            threads=1,
            num_blocks=7,
        ),
        kernels,
    )


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_qwen3_allocates_what_was_planned(
    tmp_path: Path, kernels: Kernels, quantization: str | None, tp: int, pp: int
) -> None:
    backend(kernels)
    sizes = {"hidden": 72, "intermediate": 104, "heads": 6, "kv_heads": 3, "head_dim": 20}
    tiny_qwen3(tmp_path, layers=3, vocab=131, **sizes)
    config = GroupConfig(
        model_path=str(tmp_path),
        quantization=quantization,
        tp=tp,
        pp=pp,
        kernels=kernels,
        threads=1,
        num_blocks=7,
    )
    check_group(config, kernels)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_a_llama_4_without_experts_allocates_what_was_planned(
    tmp_path: Path, tp: int, pp: int
) -> None:
    tiny_llama4(tmp_path, experts=0, moe_step=0, top_k=0, chunk=None)
    config = GroupConfig(
        model_path=str(tmp_path), tp=tp, pp=pp, kernels="reference", threads=1, num_blocks=7
    )
    check_group(config, "reference")


def test_no_fp8_release_of_qwen3_is_known() -> None:
    with pytest.raises(SpecError, match="no FP8 release of Qwen3 is known; use `dtype`=fp8"):
        group("qwen3-8b", "fp8-shipped")


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_quantized_on_load_allocates_what_was_planned(
    tmp_path: Path, kernels: Kernels, quantization: str
) -> None:
    backend(kernels)
    tiny_llama(tmp_path, hidden=72, intermediate=104, heads=6, kv_heads=3, vocab=131)
    config = GroupConfig(
        model_path=str(tmp_path),
        quantization=quantization,
        tp=2,
        kernels=kernels,
        threads=1,
        num_blocks=7,
    )
    check_group(config, kernels)


def test_graphs_are_counted_as_they_are_captured() -> None:
    from arriero.shards.worker.cuda.graphs import buckets_up_to

    for most in (1, 2, 3, 8, 9, 64, 65, 200, 256, 1000):
        assert num_graphs(most) == len(buckets_up_to(most))


def backend(kernels: Kernels) -> Ops:
    try:
        return ops_for(torch.device("cpu"), kernels, 1)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(64, 64), (50, 37), (1, 2), (96, 130)])
def test_packed_bytes_are_the_backend_s(kernels: Kernels, shape: tuple[int, int]) -> None:
    ops = backend(kernels)
    weight = torch.randn(shape)
    bias = torch.zeros(shape[0])

    def packed_nbytes(precision: Precision, **form: Any) -> int:  # noqa: ANN401
        rows, columns = shape
        matrix = MatrixSize(out_features=rows, in_features=columns, precision=precision, **form)
        return BACKENDS[kernels].packed_nbytes(matrix).total

    plain: dict[Precision, torch.dtype] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    for name, dtype in plain.items():
        for vector in (None, bias):
            made = ops.pack_linear([weight], vector, dtype)
            expected = packed_nbytes(name, bias=vector is not None)
            assert made.nbytes == expected, (name, vector is None)
        assert ops.pack_vocab(weight, 0, dtype).nbytes == packed_nbytes(name)
    quantized: dict[Precision, QuantizedWeight] = {
        "int8": quantize_int8(weight),
        "fp8": quantize_fp8(weight),
        "int4": quantize_int4(weight, 32, search=False),
    }
    for kind, one in quantized.items():
        try:
            made = ops.pack_quantized([one], bias)
        except NotImplementedError:
            continue
        assert made.nbytes == packed_nbytes(kind, group_size=32, bias=True), kind


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (24, 12)])
def test_kv_blocks_are_the_backend_s(
    kernels: Kernels, dtype: str, head_dim: int, block_size: int
) -> None:
    spec = KVCacheSpec(
        num_layers=2,
        num_blocks=3,
        num_kv_heads=5,
        head_dim=head_dim,
        block_size=block_size,
        dtype=getattr(torch, dtype),
    )
    block = BACKENDS[kernels].kv_block_nbytes(
        KvBlockSize(kv_heads=5, head_dim=head_dim, block_size=block_size, dtype=dtype)
    )
    assert backend(kernels).kv_cache(spec, torch.device("cpu")).nbytes == 2 * 3 * block


# The command.


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.run(["plan", *args])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = "--model llama-3.1-405b --dtype bfloat16 --gpu h100-80g --nodes 2 --gpus-per-node 8"
    code, out, _ = run(capsys, *args.split(), "--tp", "8", "--pp", "2", "--json")
    assert code == 0
    got = json.loads(out)
    assert len(got["ranks"]) == 16
    for rank in got["ranks"]:
        assert rank["kv_bytes_per_token"] == 32_256
        assert rank["weights_bytes"] / 1e9 == pytest.approx(50.7, rel=0.005)
        parts = sum(rank["weights_by_kind"].values()) + rank["scales_bytes"]
        assert parts == rank["weights_bytes"]
        whole = ("weights", "kv_pool", "activations", "cuda_graphs", "communication")
        rest = ("spare_experts", "reserve", "unused")
        total = sum(rank[f"{name}_bytes"] for name in (*whole, *rest))
        assert total == rank["memory_bytes"]
    assert got["fits"] and got["layouts"][0]["works"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--model llama-3.1-405b --dtype bfloat16 --tp 8", "GB short"),
        ("--model llama-4-maverick --nodes 2 --tp 16", "40 query heads % 16"),
        ("--model llama-3.1-8b --tp 16", "needs 16 slices"),
        ("--model llama-9", "llama-3.1-405b"),
        ("--model llama-3.1-8b --gpu abacus", "abacus"),
        ("--model llama-3.1-8b --gpu cpu", "--memory"),
        ("--model llama-3.1-8b --dtype int3", "int3"),
        ("--model llama-3.1-8b --kv-dtype int3 --tp 1", "int3"),
        ("--model llama-3.1-8b --context 200000 --tp 1", "131072"),
        ("--model llama-3.1-8b --tp 2 --dp 2", "more groups"),
        ("--model llama-3.1-8b --memory much", "much"),
        ("--model llama-3.1-8b --nodes 0", "nodes"),
        ("--model llama-4-scout --nodes 9000000 --tp 8 --dp 900000", "at most 4096"),
        ("--model llama-3.1-8b --max-sequences 0", "max_sequences"),
        ("", "nothing to plan"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], args: str, said: str) -> None:
    code, _, err = run(capsys, *args.split())
    assert code == 2
    assert said in err and err.count("\n") == 1


def test_tables_name_ranks_and_contexts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = run(capsys, "--model", "llama-4-maverick", "--dtype", "fp8-shipped", "--tp", "8")
    assert code == 0
    for said in ("shared expert", "1,048,576", "TP8 EP8", "48.32", "estimated tokens/s"):
        assert said in out
    assert "estimates by constants that are not all measured" in out


def test_speeds_are_estimated_for_gpus_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--model", "llama-3.1-8b", "--tp", "2", "--json")
    assert code == 0
    works = [option for option in json.loads(out)["layouts"] if option["works"]]
    for option in works:
        estimate = option["estimate"]
        single = estimate["single_request_tokens_per_s"]
        assert 0 < single < estimate["full_batch_tokens_per_s"] < estimate["prefill_tokens_per_s"]
        assert estimate["full_batch_tokens_per_s"] < option["decode_tokens_per_s"]
    args = "--model llama-3.1-8b --gpu cpu --memory 64GiB --tp 1 --json"
    code, out, _ = run(capsys, *args.split())
    assert code == 0
    assert {option["estimate"] for option in json.loads(out)["layouts"] if option["works"]} == {
        None
    }


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            "llama-3.1-405b --dtype fp8-shipped",
            "llama-3.1-405b, fp8-shipped, on 1 x 8 h100-80g of 84.93 GB\n"
            "TP8 works, 1 group of 8: a group's weights take 487.41 GB, the fullest rank's "
            "60.93 GB\nKV cache of a group: 281,760 tokens, 34 sequences of 8,192 at once\n",
        ),
        # smaller forms are ranked, but the weights as published are what is planned
        ("llama-3.1-8b --gpu rtx4090-24g --gpus-per-node 1", "llama-3.1-8b, bfloat16, on 1 x 1"),
        ("llama-3.1-405b", "llama-3.1-405b, fp8-shipped, on 1 x 8"),
        ("llama-3.1-405b --tp 8", "TP8 does not fit; the reason is below the tables\n"),
        ("llama-3.1-405b --tp 8", "rank 0 lacks 22.90 GB: its weights take 101.48 of 84.93 GB"),
    ],
)
def test_what_a_newcomer_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: str, said: str
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    _, out, _ = run(capsys, "--model", *args.split())
    assert said in out


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    args = "--model llama-3.1-70b --gpu rtx4090-24g --gpus-per-node 1"
    code, out, err = run(capsys, *args.split())
    assert code == 2
    assert "llama-3.1-70b, int4, on 1 x 1" in out  # what lacks least
    assert "sequences at once" not in out
    assert err.endswith("; 1 x 4 rtx4090-24g hold it, as fp8 in TP4\n")


def test_a_spec_is_planned_as_the_leader_will_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_llama(tmp_path / "m", layers=3)
    text = "models:\n- {name: tiny, path: m, groups: 2, mesh: {tp: 2}, kv: {memory: 1MB}}\n"
    (tmp_path / "arriero.yaml").write_text(text)
    spec = str(tmp_path / "arriero.yaml")
    code, out, _ = run(capsys, spec, "--gpu", "cpu", "--memory", "8GiB", "--json")
    assert code == 0
    got = json.loads(out)
    decided = resolve(GroupConfig(model_path="", tp=2, kv_bytes=10**6), config)
    assert decided.num_blocks is not None
    assert [one["kv_pool_bytes"] // one["kv_block_bytes"] for one in got["ranks"]] == [
        decided.num_blocks
    ] * 2
    assert got["groups"] == 2
    code, _, err = run(capsys, spec, "--gpus-per-node", "2")
    assert code == 2 and "4 slices" in err
    code, _, err = run(capsys, spec, "--gpu", "cpu", "--memory", "200MB")
    assert code == 2 and "rank 0" in err
    (tmp_path / "arriero.yaml").write_text(text.replace("groups: 2", "groups: 1, spares: 1"))
    assert run(capsys, spec, "--gpus-per-node", "4")[0] == 0
    code, _, err = run(capsys, spec, "--gpus-per-node", "2")
    assert code == 2 and "4 slices" in err  # a spare group takes a place too


def test_a_window_in_a_spec_is_planned_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(tmp_path / "m", max_positions=2048)
    attention = "{sliding_window: 64, attention_sinks: 4}"
    text = f"models:\n- {{name: tiny, path: m, kv: {{blocks: 100}}, attention: {attention}}}\n"
    (tmp_path / "arriero.yaml").write_text(text)
    asked = (str(tmp_path / "arriero.yaml"), "--gpu", "cpu", "--memory", "8GiB", "--json")
    code, _, err = run(capsys, *asked)
    assert code == 2 and "changes this model's answers" in err and "`changes_answers`" in err
    text = text.replace("sinks: 4", "sinks: 4, changes_answers: true").replace("}}\n", "}, ")
    text += "limits: {max_batch_tokens: 160}}\n"
    (tmp_path / "arriero.yaml").write_text(text)
    code, out, _ = run(capsys, *asked)
    assert code == 0
    at = {one["context"]: one["concurrency"] for one in json.loads(out)["capacity"]}
    # 1 block of sinks, 4 of the window and 1 that it begins; 10 for a step
    assert {at[context] for context in at if context >= 1024} == {(100 - 10) // 6}


def test_tiers_of_the_kv_cache_are_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(tmp_path / "m", layers=3, kv_heads=2)
    kv = f"{{memory: 1MB, host: 2MiB, disk: {{path: {tmp_path}/kv, size: 3MB}}}}"
    text = f"models:\n- {{name: tiny, path: m, mesh: {{tp: 2}}, kv: {kv}}}\n"
    (tmp_path / "arriero.yaml").write_text(text)
    spec = str(tmp_path / "arriero.yaml")
    code, out, _ = run(capsys, spec, "--gpu", "cpu", "--memory", "8GiB", "--json")
    assert code == 0
    got = json.loads(out)
    block = sum(one["kv_block_bytes"] for one in got["ranks"])
    tiers = got["kv_tiers"]
    assert tiers["host"]["tokens"] == (2 << 20) // block * 16
    assert tiers["disk"]["tokens"] == 3 * 10**6 // block * 16
    assert sum(tiers["host"]["bytes_by_rank"]) == (2 << 20) // block * block
    code, out, _ = run(capsys, spec, "--gpu", "cpu", "--memory", "8GiB")
    assert code == 0 and "KV cache below the device" in out
    (tmp_path / "arriero.yaml").write_text(text.replace("2MiB", "2kB"))
    code, _, err = run(capsys, spec, "--gpu", "cpu", "--memory", "8GiB")
    assert code == 2 and "`host_bytes`=2000" in err


def test_planning_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from arriero.cluster import cli\n"
        "cli.run(['plan', '--model', 'llama-3.1-8b', '--json'])\n"
        "print(sorted({'torch', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.splitlines()[-1] == "[]"


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is optional")
    file = tmp_path / "plan.png"
    code, _, _ = run(capsys, "--model", "llama-3.1-8b", "--tp", "2", "--plot", str(file))
    assert code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = run(capsys, "--model", "llama-3.1-8b", "--plot", str(tmp_path / "p.png"))
    assert code == 2 and "pip install matplotlib" in err


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gpu", DEVICES)
def test_every_model_on_every_device_gives_an_answer(name: str, gpu: str) -> None:
    machines = Machines(gpu=gpu, nodes=1, per_node=2)
    model = find_model(name)
    try:
        options = rank_layouts(model, machines, KvDemand(context=1024), "triton", ["bfloat16"])
    except ArrieroError as error:
        pytest.fail(str(error))
    assert options


def test_a_gpu_needs_no_size_where_there_is_only_one() -> None:
    assert device("h100", None, 1) == device("H100-80G", None, 1) == DEVICES["h100-80g"]
    assert device("mi325x", None, 1).memory_bytes > 250 << 30
    with pytest.raises(SpecError, match="several sizes; give one of a100-40g, a100-80g"):
        device("a100", None, 1)
    with pytest.raises(SpecError, match="'h1' is none of"):
        device("h1", None, 1)


def test_pairs_of_ranks_and_split_buffers_are_counted() -> None:
    """Logits and activations travel by communicators between two ranks each."""
    model = find_model("llama-3.1-405b").config
    layout = ParallelConfig(tp=8, pp=2)
    parts = parts_of(model, GroupConfig(model_path="", tp=8, pp=2))
    counted = [step_memory.communicators(part, layout) for part in parts]
    assert counted[0] == (2, 1), "all ranks and its stage; the next stage"
    assert counted[8] == (2, 8), "logits of seven ranks; the stage before"
    assert counted[9] == (2, 2), "its logits; the stage before"
    single = ParallelConfig()
    assert step_memory.communicators(parts[0], single) == (0, 0)
    tuned_file = Path(registry.__file__).with_name("triton") / "tuned.json"
    tuned = json.loads(tuned_file.read_text())["default"]["attention"]["*"]
    assert tuned["most_splits"] == step_memory.MOST_SPLITS


def test_splits_of_prompts_are_counted() -> None:
    triton_interpreter.install()
    pytest.importorskip("triton")
    from arriero.cluster.planner.step_model import layers
    from arriero.kernels.triton import prefill

    assert step_memory.PROMPT_SPLITS_BYTES == prefill.PARTS_NBYTES
    assert layers.PROMPT_PROGRAMS == prefill.FULL_GPU
    part = parts_of(find_model("llama-3.1-405b").config, GroupConfig(model_path="", tp=8))[0]
    few = KvDemand(context=1024, max_sequences=1, max_batch_tokens=8192)
    config = find_model("llama-3.1-405b").config
    assert step_memory.split_bytes(config, part, few) == prefill.PARTS_NBYTES
    head = 16 * 64 * 130 * 4
    many = replace(few, max_sequences=1024)
    assert step_memory.split_bytes(config, part, many) == 1024 * head
    assert step_memory.split_bytes(config, part, replace(few, max_batch_tokens=4)) == 4 * head

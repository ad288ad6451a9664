"""The launches of the account are the launches that the simulated CUDA device counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu import shapes
from gpu.shapes import Shape
from torch.testing._internal.distributed.fake_pg import FakeStore

from arriero.cluster.planner.catalog import DEVICES, find_model
from arriero.cluster.planner.demand import KvDemand
from arriero.cluster.planner.memory import plan_group
from arriero.cluster.planner.step_model.account import account
from arriero.cluster.planner.step_model.work import StepLoad, Work, launches_by_kernel
from arriero.cluster.planner.weight_forms import weights_as
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8
from arriero.kernels.symmetric_memory import (
    PROGRAMS,
    SIGNALS_NBYTES,
    SymmetricMemory,
    block_nbytes,
)
from arriero.kernels.triton import triton_ops
from arriero.shards.collectives.all_to_all import DirectExchange
from arriero.shards.collectives.mesh import Mesh
from arriero.shards.collectives.symmetric_sizes import BUFFER_NBYTES
from arriero.shards.collectives.symmetric_sums import SymmetricSums
from arriero.shards.config.group import GroupConfig
from arriero.shards.config.parallel import ParallelConfig
from arriero.shards.layout.resolve import resolve
from arriero.shards.worker.cuda.runner import CudaRunner
from support import triton_interpreter
from support.fake_cuda import Ledger, simulated
from support.models import tiny_llama, tiny_llama4
from support.quantized_models import fp8_llama4, quantized_llama

triton_interpreter.install()  # before anything imports the kernels
pytest.importorskip("triton")

NO_KERNEL = {
    "aten::view", "aten::slice", "aten::select", "aten::unbind", "aten::expand", "aten::detach",
    "aten::t", "aten::transpose", "aten::unsqueeze", "aten::split", "aten::alias", "aten::permute",
    "aten::as_strided", "aten::_unsafe_view", "aten::_reshape_alias", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty",
}  # fmt: skip
"""Torch's ops that launch nothing: views and allocations."""


def make(path: Path, family: str) -> None:
    if family == "llama":
        tiny_llama(path, seed=3)
    elif family == "llama4":
        tiny_llama4(path, seed=3, layers=4, experts=4, chunk=8)
    elif family == "fp8 experts":
        fp8_llama4(path, seed=3, layers=2, experts=4, chunk=8)
    else:
        quantized_llama(path, family, layers=2)


def counted(folder: Path, dtype: str) -> list[Counter[str]]:
    """Launches of a captured decode step of a sequence: drawing, and greedy."""
    config = GroupConfig(
        model_path=str(folder),
        dtype=dtype,
        device="cuda",
        kernels="triton",
        block_size=4,
        num_blocks=20,
        num_local_blocks=20,
        max_model_len=32,
        max_sequences=1,
        max_batch_tokens=2,
    )
    with simulated() as device:
        runner = CudaRunner(resolve(config, find_model(str(folder)).config), 0)
        for all_greedy in (False, True):
            assert runner._graphs is not None, "a dense step on one rank is captured"
            runner._capture(runner._graphs, 1, all_greedy)
        recordings = device.recordings
        runner.close()
    return [Counter(op for op in ops if op not in NO_KERNEL) for ops in recordings]


def accounted(folder: Path, dtype: str, *, draws: bool) -> Counter[str]:
    model = find_model(str(folder))
    weights = replace(weights_as(model.config, model.scheme, "checkpoint"), base=dtype)
    demand = KvDemand(context=32, kv_dtype=dtype, max_sequences=1, max_batch_tokens=2)
    device = DEVICES["h200-141g"]
    plan = plan_group(model, weights, ParallelConfig(), demand, device, "triton")
    step = account(plan, StepLoad(sequences=1, context=32, draws=draws), 8)
    return launches_by_kernel(work for work in step.works if work.captured)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("llama4", "float32"),
        ("fbgemm_fp8", "float32"),
        ("fbgemm_fp8", "bfloat16"),
        ("fp8 experts", "float32"),
        ("fp8 experts", "bfloat16"),
    ],
)
def test_launches_of_a_decode_step(tmp_path: Path, family: str, dtype: str) -> None:
    make(tmp_path, family)
    drawing, greedy = counted(tmp_path, dtype)
    for launches in (drawing, greedy):
        # the interpreter clears the outputs of experts, whose last rows nothing writes
        launches["aten::zeros"] -= launches["_grouped_matmul"]
    assert +greedy == accounted(tmp_path, dtype, draws=False)
    expected = accounted(tmp_path, dtype, draws=True)
    # the interpreter takes 3 bits in a pass of a filter, in place of 5
    assert drawing.pop("_narrow") == 2 * 16 and expected.pop("_narrow") == 2 * 10
    assert +drawing == expected


@pytest.mark.parametrize("beside", [False, True])
def test_launches_of_an_exchange_in_blocks(tmp_path: Path, beside: bool) -> None:
    """Of a decode of rank 0 of two with data-parallel attention; the other rank does not exist.

    With a second stream the same launches are in the graph: the stream forks, and joins again.
    """
    tiny_llama4(tmp_path, seed=3, layers=2, experts=4, chunk=8)
    config = GroupConfig(
        model_path=str(tmp_path),
        dtype="float32",
        device="cuda",
        kernels="triton",
        dp=2,
        block_size=4,
        num_blocks=20,
        num_local_blocks=20,
        max_model_len=32,
        max_sequences=2,
        max_batch_tokens=2,
    )
    with simulated() as device:
        runner = CudaRunner(resolve(config, find_model(str(tmp_path)).config), 0)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        assert dist.group.WORLD is not None and runner._graphs is not None
        runner.mesh._stage_group = dist.group.WORLD
        runner.mesh._exchange = DirectExchange(0, dist.group.WORLD)
        if beside:
            runner.mesh.beside.open(dist.HashStore(), 0, 1)
        device.clear()
        for all_greedy in (None, True):
            runner._capture(runner._graphs, 2, all_greedy)
        ops = [op for recording in device.recordings for op in recording]
        assert not device.waits and not device.pageable
        runner.mesh.leave()
        runner.close()
    launches = Counter(op for op in ops if op not in NO_KERNEL)
    launches["aten::zeros"] -= launches["_grouped_matmul"]
    model = find_model(str(tmp_path))
    weights = replace(weights_as(model.config, model.scheme, "checkpoint"), base="float32")
    demand = KvDemand(context=32, kv_dtype="float32", max_sequences=2, max_batch_tokens=2)
    gpu, layout = DEVICES["h200-141g"], ParallelConfig(dp=2)
    plan = plan_group(model, weights, layout, demand, gpu, "triton")
    works = account(plan, StepLoad(sequences=2, context=32, draws=False), 8).works
    messages = sum((Counter(dict(work.messages)) for work in works), Counter())
    gathered = launches.pop("all_gather_single", 0) + launches.pop("all_gather_into_tensor", 0)
    assert messages == {"all_gather": gathered, "all_to_all": launches.pop("all_to_all_single")}
    assert +launches == launches_by_kernel(work for work in works if work.captured)


def eight_ranks(per_node: int) -> list[Work]:
    """The work of a decode step of two sequences of the 8B at TP8."""
    model = find_model("llama-3.1-8b")
    weights = weights_as(model.config, None, "bfloat16")
    demand, device = KvDemand(context=32), DEVICES["h200-141g"]
    plan = plan_group(model, weights, ParallelConfig(tp=8), demand, device, "triton")
    return list(account(plan, StepLoad(sequences=2, context=32), per_node).works)


@contextmanager
def first_of_eight() -> Iterator[tuple[Ledger, Ops, Mesh]]:
    """Rank 0 of a group whose other ranks do not exist: its own launches are what counts."""
    with simulated() as simulation:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        part: Any = SimpleNamespace(rank=0, tp_rank=0, first_stage=True, last_stage=True)
        mesh = Mesh(part, ParallelConfig(tp=8), device=torch.device("cuda"))
        mesh.watchdog.marking = False
        ops = triton_ops(torch.device("cuda"), batch_independent=False)
        mesh.use(ops)
        yield simulation, ops, mesh
        mesh.leave()


def symmetric_of_eight(ops: Ops) -> SymmetricSums:
    """Sums of rank 0 with seven ranks that have given every signal already."""
    blocks = [torch.zeros(block_nbytes(BUFFER_NBYTES), dtype=torch.uint8) for _ in range(8)]
    blocks[0][:SIGNALS_NBYTES].view(torch.int64).fill_(1 << 40)
    memory = SymmetricMemory(
        address_N=torch.tensor([block.data_ptr() for block in blocks], device="cuda"),
        epoch_P=torch.zeros(PROGRAMS, dtype=torch.int64, device="cuda"),
        rank=0,
        size=8,
        buffer_nbytes=BUFFER_NBYTES,
    )
    assert ops.rank_sums is not None
    return SymmetricSums(ops.rank_sums, memory, blocks)


def kernels_of(recording: list[str]) -> Counter[str]:
    return Counter(op for op in recording if op not in NO_KERNEL)


def test_launches_of_sums_and_logits_over_eight_ranks() -> None:
    works = eight_ranks(per_node=4)
    sums, logits = (
        [w for w in works if w.item == item] for item in ("TP sums", "logits to rank 0")
    )
    with first_of_eight() as (simulation, _, mesh):
        x_TH = torch.zeros(2, 16, device="cuda")
        tokens_R = torch.zeros(2, dtype=torch.int32, device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            mesh.reduce(x_TH)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            mesh.gather_logits(x_TH, [16] * 8)
            mesh.share_tokens(tokens_R)
    summed, gathered = map(kernels_of, simulation.recordings)
    assert summed.pop("all_gather_single", 0) + summed.pop("all_gather_into_tensor", 0) == 1
    assert [dict(work.messages) for work in sums] == [{"all_gather": 65}]
    assert launches_by_kernel(sums) == Counter({name: 65 * n for name, n in summed.items()})
    (end,) = logits
    assert dict(end.messages) == {name: gathered.pop(name) for name in ("recv", "broadcast")}
    assert launches_by_kernel(logits) == gathered


def test_launches_of_layers_over_eight_ranks() -> None:
    """Two layers by NCCL and over symmetric memory: collective, adds and norm become a launch."""
    shape = Shape(name="tiny", hidden=32, mlp=48, q_heads=4, kv_heads=1, head_dim=16, layers=2)
    counts = []
    with first_of_eight() as (simulation, ops, mesh):
        device = torch.device("cuda")
        sequences = [(20, 1)] * 2
        layers = [shapes.layer(ops, shape, torch.float32, device) for _ in range(2)]
        kv = shapes.cache(ops, shape, sequences, torch.float32, device)
        batch = shapes.batch(sequences, shape.head_dim, device)
        run = ops.decoder(layers, kv, mesh.reduce, reduce_norm=mesh.reduce_norm)
        x_TH = torch.zeros(2, 32, device="cuda")
        for symmetric in (None, symmetric_of_eight(ops)):
            mesh._symmetric = symmetric
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                run(x_TH, batch)
            counts.append(kernels_of(simulation.recordings[-1]))
    by_nccl, shared = counts
    gathers = by_nccl.pop("all_gather_single", 0) + by_nccl.pop("all_gather_into_tensor", 0)
    assert gathers == by_nccl.pop("_add_parts") == by_nccl["_rms_norm"] == 4
    assert shared.pop("_symmetric_sum") == 4 and shared["_rms_norm"] == 1
    assert by_nccl - shared == Counter({"_rms_norm": 3}) and not shared - by_nccl
    works = eight_ranks(per_node=8)
    launches = launches_by_kernel(w for w in works if w.item in ("TP sums", "norms, residual"))
    sums = 2 * 32 + 1  # the embedding's too
    assert launches == Counter({"_symmetric_sum": sums, "_rms_norm": 1, "aten::add_": 1})


def float8_layer(ops: Ops, shape: Shape) -> DenseLayer:
    """A layer whose products round their inputs, the router's excepted."""

    def product(linear: Linear, seed: int) -> Linear:
        size = linear.out_features, linear.in_features
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(*size, generator=generator) / size[1] ** 0.5
        inputs = InputTransform(num_inputs=size[1], bound=math.inf)
        return ops.pack_transformed([quantize_fp8(weight)], None, inputs)

    layer = shapes.layer(ops, shape, torch.bfloat16, ops.device)
    made: dict[str, Any] = {
        name: product(getattr(layer, name), seed)
        for seed, name in enumerate(("qkv", "o", "gate_up", "down"))
    }
    for name in ("experts_gate_up", "experts_down") if shape.experts else ():
        experts = getattr(layer, name)
        made[name] = [product(expert, 10 + seed) for seed, expert in enumerate(experts)]
    return replace(layer, **made)


DENSE = Shape(name="tiny", hidden=32, mlp=48, q_heads=4, kv_heads=1, head_dim=16, layers=2)
ROUNDING_OF = "arriero.kernels.triton.fused_layers.rounding_of"
ROUTED = replace(DENSE, experts=2, expert_mlp=32)


@pytest.mark.parametrize(
    ("shape", "before", "after"), [(DENSE, 4, 1), (ROUTED, 5, 2)], ids=["dense", "experts"]
)
@pytest.mark.parametrize("symmetric", [False, True], ids=["NCCL", "symmetric memory"])
def test_norm_and_swiglu_round_for_the_products(
    shape: Shape, before: int, after: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches of two float8 layers over eight ranks, by separate roundings and fused ones.

    Attention's output has a rounding of its own, and so have the rows that are gathered for the
    experts; SwiGLU of the experts rounds in both cases.
    """
    counts, outputs = [], []
    with first_of_eight() as (simulation, ops, mesh):
        sequences = [(20, 1)] * 2
        layers = [float8_layer(ops, shape) for _ in range(2)]
        kv = shapes.cache(ops, shape, sequences, torch.bfloat16, ops.device)
        batch = shapes.batch(sequences, shape.head_dim, ops.device)
        run = ops.decoder(layers, kv, mesh.reduce, reduce_norm=mesh.reduce_norm)
        mesh._symmetric = symmetric_of_eight(ops) if symmetric else None
        for separate in (True, False):
            with monkeypatch.context() as patch:
                if separate:
                    patch.setattr(ROUNDING_OF, lambda w, keeps_rows=False: None)
                x_TH = torch.linspace(-2, 3, 2 * shape.hidden).view(2, -1).bfloat16().to("cuda")
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    out_TH = run(x_TH, batch)
                outputs.append(out_TH.cpu())
            counts.append(kernels_of(simulation.recordings[-1]))
    separate_counts, fused = counts
    assert separate_counts["_quantize_rows"] == 2 * before and fused["_quantize_rows"] == 2 * after
    assert separate_counts - fused == {"_quantize_rows": 6, "_silu_mul": 2}
    assert fused - separate_counts == {"_silu_mul_rounded": 2}
    if symmetric:  # the absent ranks have signalled, and their parts are zeros
        assert torch.equal(*outputs)

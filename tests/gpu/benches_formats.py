"""Times of weight formats, caches and sampling; and slices of large models without their peers.

A slice runs over torch's fake process group: its collectives cost the host their launch and no
time on the link, so that the host's own time shows, with a graph and without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from gpu import benches, checks, shapes
from gpu.benches import Machine, Result
from gpu.checks import Where
from gpu.checks_sizes import random_fp4
from gpu.shapes import LLAMA_8B, LLAMA_405B_TP8, MAVERICK_EP8, Shape

from arriero.kernels.input_transform import InputTransform, quantize_rows
from arriero.kernels.quantize import quantize_fp8
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.triton.backend import TritonOps
from arriero.kernels.triton.block_scaled import BlockScaled

KINDS = {"dense": 2.0, "int8": 1.0, "int4": 0.5, "int4_symmetric": 0.5, "fp8": 1.0}
"""Kinds of weights, and bytes of a number."""


def products(at: Where, machine: Machine) -> Result:
    """The gate and up product of the 8B in each kind of weights, from 1 to 4,096 rows."""
    out_features, in_features = (96, 64) if at.tiny else (28672, 4096)
    weight = torch.randn(out_features, in_features, device=at.device) * in_features**-0.5
    ops = at.ops(independent=False)
    out: Result = {}
    for kind, item in KINDS.items():
        linear = checks.pack(ops, kind, weight, at.dtype)
        for rows in (1,) if at.tiny else (1, 16, 64, 4096):
            x = at.randn(rows, in_features)
            taken = benches.seconds(at, lambda x=x, linear=linear: ops.linear(x, linear))
            flops = 2 * rows * out_features * in_features / machine.flops_per_s
            limit = max(flops, item * out_features * in_features / machine.bytes_per_s)
            out[f"{kind}, {rows} rows"] = {"ms": taken * 1e3, "share": limit / taken}
    out |= _rounded_inputs(at, machine, weight)
    out |= _fp4_inputs(at, machine)
    out |= _rounded_experts(at, machine)
    return out


def _fp4_inputs(at: Where, machine: Machine) -> Result:
    """Products with inputs rounded to NVFP4: torch's own in the fast mode of Blackwell."""
    result = Result()
    rows, columns = (96, 64) if at.tiny else (28672, 4096)
    scale = torch.full((1,), 6 / 448 / 6)
    inputs = InputTransform(num_inputs=columns, levels="fp4", scale=scale)
    ops = at.ops(independent=False)
    linear = ops.pack_transformed([random_fp4(rows, columns)], None, inputs)
    name = "block-scaled" if isinstance(linear.packed, BlockScaled) else "Triton's"
    for count in (4,) if at.tiny else (1, 16, 64, 4096):
        x = at.randn(count, columns)
        taken = benches.seconds(at, lambda x=x: ops.linear(x, linear))
        # four bits at four times the rate
        flops = 2 * count * rows * columns / (4 * machine.flops_per_s)
        limit = max(flops, rows * columns * 9 / 16 / machine.bytes_per_s)
        result[f"fp4 inputs, {name}, {count} rows"] = {"ms": taken * 1e3, "share": limit / taken}
    return result


def _rounded_experts(at: Where, machine: Machine) -> Result:
    """A Maverick layer's 16 experts at EP8 with inputs rounded to float8, in both modes."""
    result = Result()
    count, rows, columns = (3, 32, 64) if at.tiny else (16, 16384, 5120)
    weights = [quantize_fp8(torch.randn(rows, columns) * columns**-0.5)] * count
    inputs = InputTransform(num_inputs=columns, bound=1200.0)
    for mode, independent in (("fast", False), ("exact", True)):
        ops = at.ops(independent=independent)
        experts = [ops.pack_transformed([weight], None, inputs) for weight in weights]
        for each in (2,) if at.tiny else (1, 4, 256):
            starts = (torch.arange(count + 1, device=at.device) * each).int()
            x = at.randn(count * each, columns)
            taken = benches.seconds(
                at,
                lambda x=x, ops=ops, experts=experts, starts=starts: ops.grouped_linear(
                    x, experts, starts
                ),
            )
            flops = 2 * len(x) * rows * columns / (2 * machine.flops_per_s)
            limit = max(flops, count * rows * columns / machine.bytes_per_s)
            name = f"{count} fp8 experts, {each} rows each, {mode}"
            result[name] = {"ms": taken * 1e3, "share": limit / taken}
        benches.free(at)
    return result


def _rounded_inputs(at: Where, machine: Machine, weight: torch.Tensor) -> Result:
    """Products with inputs rounded to float8, as the FP8 checkpoints have them; torch's beside."""
    ops, result = at.ops(independent=False), Result()
    inputs = InputTransform(num_inputs=weight.shape[1], bound=1200.0)
    linear = ops.pack_transformed([quantize_fp8(weight)], None, inputs)
    for rows in (4,) if at.tiny else (1, 16, 64, 4096):
        x = at.randn(rows, weight.shape[1])
        taken = benches.seconds(at, lambda x=x: ops.linear(x, linear))
        # float8 at twice the rate
        flops = 2 * rows * weight.numel() / (2 * machine.flops_per_s)
        limit = max(flops, weight.numel() / machine.bytes_per_s)
        result[f"fp8 inputs, {rows} rows"] = {"ms": taken * 1e3, "share": limit / taken}
    if not at.tiny:
        q, scale = quantize_rows(x, 1200.0)
        w = quantize_fp8(weight)
        rights = (w.data.view(torch.float8_e4m3fn).T, w.scales.view(1, -1).to(at.device))

        def theirs() -> None:
            torch._scaled_mm(q, rights[0], scale, rights[1], out_dtype=torch.bfloat16)

        taken = benches.seconds(at, theirs)
        result["torch._scaled_mm"] = {"ms": taken * 1e3, "share": limit / taken}
    return result


def caches(at: Where, machine: Machine) -> Result:
    """Decode attention over each type of cache: the 8B's heads and the 405B's at TP8."""
    out: Result = {}
    ops = TritonOps(at.device, batch_independent=False)
    for shape in (LLAMA_8B, LLAMA_405B_TP8):
        shape = shape.tiny() if at.tiny else shape
        for count, context in ((1, 40),) if at.tiny else ((64, 4096), (4, 32768)):
            sequences = [(context - 1, 1)] * count
            for dtype in (at.dtype, torch.int8, checks.FP8):
                taken = benches.attention_s(at, ops, shape, sequences, dtype)
                size = count * context * 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
                name = f"{shape.name}, {count} x {context}, {str(dtype)[6:]}"
                out[name] = {"ms": taken * 1e3, "share": size / machine.bytes_per_s / taken}
                benches.free(at)
    return out


def sampling(at: Where, machine: Machine) -> Result:
    """A draw of 64 rows: greedy, with temperature, with top-k, with top-p."""
    rows, vocab = (2, 96) if at.tiny else (64, 128256)
    logits = torch.randn(rows, vocab, device=at.device)
    ones = torch.ones(rows, device=at.device)
    greedy = benches.greedy(rows, at.device)
    drawn = replace(greedy, temperature_R=ones, all_greedy=False)
    cases: dict[str, SamplingRows] = {
        "greedy": greedy,
        "temperature": drawn,
        "top-k 40": replace(drawn, top_k_R=(ones * 40).int()),
        "top-p 0.9": replace(drawn, top_p_R=ones * 0.9),
    }
    ops, out = at.ops(), Result()
    for name, params in cases.items():
        taken = benches.seconds(at, lambda params=params: ops.sample(logits, params))
        limit = logits.nbytes / machine.bytes_per_s
        out[name] = {"ms": taken * 1e3, "share": limit / taken}
    return out


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """A process group of `size` ranks of which only this one exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def slices(at: Where, machine: Machine) -> Result:
    """Eight layers of a slice of the 405B at TP8 and of Maverick at EP8: eager and captured."""
    out: Result = {}
    for shape in (LLAMA_405B_TP8, MAVERICK_EP8):
        sized = replace(shape.tiny() if at.tiny else shape, layers=2 if at.tiny else 8)
        with fake_ranks(8):
            for count in (1,) if at.tiny else (1, 64):
                eager, captured = _slice_s(at, sized, count)
                out[f"{shape.name}, batch {count}"] = {
                    "eager_ms": eager * 1e3,
                    "captured_ms": captured * 1e3,
                    "times": eager / captured,
                }
        benches.free(at)
    return out


def _slice_s(at: Where, shape: Shape, count: int) -> tuple[float, float]:
    """Seconds of a decode step of `count` sequences: op by op, and as a graph."""
    from arriero.shards.collectives.mesh import Mesh
    from arriero.shards.config.parallel import ParallelConfig

    part: Any = SimpleNamespace(rank=0, tp_rank=0, first_stage=True, last_stage=True)
    mesh = Mesh(part, ParallelConfig(tp=8), device=at.device)
    mesh.watchdog.marking = False
    ops = TritonOps(at.device, batch_independent=False)
    mesh.add_parts = ops.add_parts
    layers = [shapes.layer(ops, shape, at.dtype, at.device) for _ in range(shape.layers)]
    sequences = [(20 if at.tiny else 1023, 1)] * count
    kv = shapes.cache(ops, shape, sequences, at.dtype, at.device)
    batch = shapes.batch(sequences, shape.head_dim, at.device)
    run = ops.decoder(layers, kv, mesh.reduce)
    x = at.randn(count, shape.hidden)

    def work() -> None:
        run(x.clone(), batch)

    repeats = 1 if at.tiny else 10
    work()
    benches.wait(at)
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    benches.wait(at)
    eager = (time.perf_counter() - started) / repeats
    captured = benches.seconds(at, work, repeats=repeats)
    mesh.watchdog.close()
    return eager, captured


BENCHES: dict[str, Callable[[Where, Machine], Result]] = {
    "products by kind": products,
    "attention by cache": caches,
    "sampling": sampling,
    "slices over a fake group": slices,
}

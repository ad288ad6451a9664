"""Compile every kernel, as the backend launches it, for a GPU that need not be here.

Run as a script. Launches are turned into compilations; what they would compute is never looked
at, so tensors may lie on the CPU. Prints a line for each kernel compiled: its name, bytes of shared
memory, and which matrix instructions it holds.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import shapes
from kernels.draws import Row, batch_of

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.layers import AttentionStyle, MoELayer
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.triton import launch
from arriero.kernels.triton.backend import TritonOps
from arriero.kernels.triton.norm import rms_norm

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SEQUENCES = [(40, 1), (0, 37)]
SHAPE = shapes.Shape(name="small", hidden=512, mlp=1024, q_heads=32, kv_heads=8)
STYLES = (
    AttentionStyle(),
    AttentionStyle(rope="pairs", qk_norm=True, mask=AttentionMaskSpec(chunk_size=64)),
    AttentionStyle(mask=AttentionMaskSpec(window=48)),
    AttentionStyle(mask=AttentionMaskSpec(window=48, sinks=4)),
    AttentionStyle(rope="none", query_scale=(0.1, 8192)),
)


class AbsentGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:  # noqa: ANN401
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


def compile_only(most_shared: int) -> None:
    """Turn every launch in this process into a compilation."""
    run, seen = jit.JITFunction.run, set()

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:  # noqa: ANN401
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            shared, ptx = kernel.metadata.shared, kernel.asm["ptx"]
            kinds = [kind for kind in ("wgmma", "mma.sync") if kind in ptx]
            print(self.fn.__name__, shared, *kinds, flush=True)
            assert shared <= most_shared, f"{self.fn.__name__} asks for {shared} bytes"
        return kernel

    jit.JITFunction.run = compiled


def launch_everything() -> None:
    ops = TritonOps(CPU, batch_independent=True)
    rms_norm(torch.zeros(2, 16384, dtype=BF16), torch.ones(16384), 1e-5)
    batch = shapes.batch(SEQUENCES, SHAPE.head_dim, CPU)
    x = torch.zeros(38, SHAPE.hidden, dtype=BF16)
    for kv_dtype in (BF16, torch.int8, torch.float8_e4m3fn):
        for style in STYLES:
            layer = dataclasses.replace(shapes.layer(ops, SHAPE, BF16, CPU), style=style)
            kv = shapes.cache(ops, SHAPE, SEQUENCES, kv_dtype, CPU)
            ops.decoder([layer], kv, None)(x, batch)
            weights = torch.ones(SHAPE.head_dim)
            layer = dataclasses.replace(layer, q_norm_D=weights, k_norm_D=weights)
            ops.decoder([layer], kv, None)(x, batch)
    weight = torch.randn(256, 512)
    int4 = quantize_int4(weight, 128, search=False)
    for one in (
        quantize_int8(weight),
        quantize_fp8(weight),
        int4,
        dataclasses.replace(int4, zeros=None),
    ):
        for independent in (True, False):
            mode = TritonOps(CPU, batch_independent=independent)
            linear = mode.pack_quantized([one], None)
            for rows in (1, 64, 2048):
                mode.linear(x[:1].expand(rows, -1).contiguous(), linear)
        starts = torch.tensor([0, 4, 8], dtype=torch.int32)
        ops.grouped_linear(x[:8], [linear, linear], starts)
        ops.embed(torch.zeros(4, dtype=torch.int32), ops.pack_quantized_vocab(one, 0))
    experts = dataclasses.replace(SHAPE, experts=16, expert_mlp=256)
    layer = shapes.layer(ops, experts, BF16, CPU)
    assert isinstance(layer, MoELayer)
    ops.moe_block(x, layer)
    every = torch.arange(38, dtype=torch.int32)
    formats: tuple[RowFormat, ...] = ("float32", "bfloat16", "fp8")
    for format in formats:
        sent = ops.pack_rows(x, every, torch.ones(38), format)
        ops.unpack_rows(sent, every, SHAPE.hidden, format, BF16)
    for bound in (1200.0, math.inf):
        ops.quantize_rows(x, bound)
    vocab = ops.pack_vocab(torch.zeros(64, 512), 0, BF16)
    ops.embed(torch.zeros(4, dtype=torch.int32), vocab)
    ops.logits(x, torch.ones(512), 1e-5, vocab)
    size = 128256
    all_kinds = [Row(repetition=1.1, presence=0.1, frequency=0.1, allowed=(1, 2)), Row(top_k=3)]
    for rows in (all_kinds, [Row()] * 2, [Row(temperature=0)] * 2):
        ops.sample(torch.zeros(2, size), batch_of(rows, size))


if __name__ == "__main__":
    warnings.simplefilter("error", SyntaxWarning)
    assert not launch.INTERPRETED, "TRITON_INTERPRET is set: nothing would be compiled"
    driver.set_active(AbsentGpu(90))
    torch.cuda.get_device_name = lambda device=None: "absent"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    compile_only(most_shared=227 << 10)
    launch_everything()
    print("triton", triton.__version__)

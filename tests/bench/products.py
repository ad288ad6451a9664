"""How near a step's matrix products on CPU come to the machine's limit, by rows and weight form.

    PYTHONPATH=src python tests/bench/products.py --model smollm2 --forms bf16,int4 --rows 1,2,4,8

One thread, timed by the thread's CPU time, so that other processes on the machine count little.
The matrices are those of a decode step, in the order of the layers; all together they exceed the
caches, as in a model. The floor of a step is the larger of its bytes over the memory rate and its
operations over the rate of multiply-adds, both measured in the same run: of float32 multiply-adds,
also for forms in "-q8", whose inputs are rounded to int8 and whose share may exceed 1. Knows
matrices; knows nothing of attention and of models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from arriero.kernels.cpu import limits
from arriero.kernels.cpu.backend import CpuOps
from arriero.kernels.cpu.structs import packed_of
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8

READ_BYTES = 192 << 20
MULTIPLY_ROUNDS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Sizes of a model's matrices.

    Attributes:
        layers: layers that are packed, enough to exceed the caches.
    """

    hidden: int
    columns: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    def shapes(self) -> list[tuple[int, int]]:
        """[out, in] of a layer's matrices."""
        return [
            ((self.q_heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            (self.hidden, self.q_heads * self.head_dim),
            (2 * self.columns, self.hidden),
            (self.hidden, self.columns),
        ]


MODELS = {
    "smollm2": Model(
        hidden=576, columns=1536, q_heads=9, kv_heads=3, head_dim=64, vocab=49152, layers=30
    ),
    "llama1b": Model(
        hidden=2048, columns=8192, q_heads=32, kv_heads=8, head_dim=64, vocab=49152, layers=3
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A measured product.

    Attributes:
        part: "layers" or "vocab".
        ms: least CPU time.
        median_ms: median CPU time.
        gb_s: weights and scales read per second, at the least time.
        gflop_s: operations per second, at the least time.
        share: floor over least time.
    """

    model: str
    form: str
    part: str
    rows: int
    ms: float
    median_ms: float
    gb_s: float
    gflop_s: float
    share: float


def pack(ops: CpuOps, form: str, out_features: int, in_features: int) -> Linear:
    """A matrix of random weights; "-q8" ends a form whose inputs are rounded to int8."""
    weight_OI = torch.randn(out_features, in_features) * in_features**-0.5
    if form in ("fp32", "bf16", "fp16"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[form]
        return ops.pack_linear([weight_OI], None, dtype)
    form = form.removesuffix("-q8")
    if form == "int8":
        return ops.pack_quantized([quantize_int8(weight_OI)], None)
    if form == "fp8":
        return ops.pack_quantized([quantize_fp8(weight_OI)], None)
    group = int(form.removeprefix("int4-"))
    return ops.pack_quantized([quantize_int4(weight_OI, group, search=False, half=True)], None)


def cpu_times(run: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of this thread's CPU time for each run."""
    run()
    times = []
    for _ in range(repeats):
        started = time.thread_time_ns()
        run()
        times.append((time.thread_time_ns() - started) * 1e-9)
    return times


class Bench:
    """Products of one thread with packed matrices."""

    def __init__(self, repeats: int) -> None:
        """Measure the machine's rates."""
        self.ops = CpuOps(torch.device("cpu"), 1)
        self.rounding_ops = CpuOps(torch.device("cpu"), 1, activation_dtype="int8")
        self._repeats = repeats
        data = torch.ones(READ_BYTES // 4)
        self.memory = READ_BYTES / min(
            cpu_times(lambda: limits.read_bytes(self.ops, data), repeats)
        )
        per_round = limits.multiply_only(self.ops, 1, torch.float32)
        best_s = min(
            cpu_times(
                lambda: void(limits.multiply_only(self.ops, MULTIPLY_ROUNDS, torch.float32)),
                repeats,
            )
        )
        self.multiply = per_round * MULTIPLY_ROUNDS / best_s

    def cell(self, model: str, form: str, part: str, matrices: list[Linear], rows: int) -> Cell:
        """Time all matrices, one after the other, on `rows` rows."""
        inputs: dict[int, Tensor] = {}
        calls = []
        for matrix in matrices:
            x = inputs.setdefault(matrix.in_features, torch.randn(rows, matrix.in_features))
            out = inputs.setdefault(-matrix.out_features, torch.empty(rows, matrix.out_features))
            address = packed_of(matrix.packed).address
            calls.append((address, x.data_ptr(), x.stride(0), rows, out.data_ptr()))

        def run() -> None:
            for call in calls:
                self.ops.call("linear", *call)

        times = cpu_times(run, self._repeats)
        num_bytes = sum(matrix.nbytes for matrix in matrices)
        operations = 2.0 * rows * sum(m.out_features * m.in_features for m in matrices)
        best_s = min(times)
        floor_s = max(num_bytes / self.memory, operations / self.multiply)
        return Cell(
            model=model,
            form=form,
            part=part,
            rows=rows,
            ms=round(best_s * 1e3, 3),
            median_ms=round(statistics.median(times) * 1e3, 3),
            gb_s=round(num_bytes / best_s * 1e-9, 2),
            gflop_s=round(operations / best_s * 1e-9, 1),
            share=round(floor_s / best_s, 3),
        )


def void(_: float) -> None:
    """Drop a value."""


def main() -> None:
    """Print a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--forms", default="bf16,fp32,int8,int4-32,int4-128")
    parser.add_argument("--rows", default="1,2,3,4,5,6,8,16,32")
    parser.add_argument("--parts", default="layers,vocab")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="a file for the cells")
    arguments = parser.parse_args()
    bench = Bench(arguments.repeats)
    model = MODELS[arguments.model]
    print(f"memory {bench.memory * 1e-9:.1f} GB/s, multiply {bench.multiply * 1e-9:.1f} GFLOP/s")
    print(
        f"{'form':9} {'part':7} {'rows':>4} {'ms':>8} {'median':>8} {'GB/s':>6} {'GFLOP/s':>8}"
        f" {'share':>6}"
    )
    cells = []
    for form in arguments.forms.split(","):
        for part in arguments.parts.split(","):
            shapes = model.shapes() * model.layers
            if part == "vocab":
                shapes = [(model.vocab, model.hidden)]
            ops = bench.rounding_ops if form.endswith("-q8") else bench.ops
            matrices = [pack(ops, form, *shape) for shape in shapes]
            for rows in map(int, arguments.rows.split(",")):
                cell = bench.cell(arguments.model, form, part, matrices, rows)
                cells.append(cell)
                print(
                    f"{form:9} {part:7} {rows:4} {cell.ms:8.2f} {cell.median_ms:8.2f}"
                    f" {cell.gb_s:6.2f} {cell.gflop_s:8.1f} {cell.share:6.2f}",
                    flush=True,
                )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(cell) for cell in cells], file)


if __name__ == "__main__":
    main()

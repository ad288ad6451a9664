"""Matrix products with weights of any kind, and grouped products for the sorted rows of experts.

y[m, o] = sum over i of x[m, i] * W[o, i], in float32, columns in ascending order: the sum of a row
depends on the shape of the weights alone, if the blocks do. A product with fewer tiles than the
device has multiprocessors is split: the sums of several parts of the columns are added in order, by
one program in turn or by a program for each part, with the same bits. Knows packed weights; knows
nothing of layers.

Shape legend: M rows, O outputs, I inputs, E experts, X sorted rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.triton import tuning
from arriero.kernels.triton.expert_weights import ExpertWeights
from arriero.kernels.triton.launch import (
    EXACT,
    INTERPRETED,
    dot_type,
    kernel,
    power_of_two,
    unit_stride,
)
from arriero.kernels.triton.prefill import find_tile
from arriero.kernels.triton.tiles import multiply
from arriero.kernels.triton.tuning import MatmulBlocks, matmul_blocks
from arriero.kernels.triton.weights import Packed

SWIZZLE = 8
"""Tiles of rows that use the same tile of weights while the L2 cache has the tile."""
MOST_WORDS = 64
"""Words of four-bit weights that are multiplied at once: four registers come from each pair."""
MOST_ARRIVALS = 1024
"""Tiles of the largest product whose parts are computed by several programs."""

Split = Literal["whole", "in turn", "programs"]


def make_arrivals(device: torch.device) -> Tensor:
    """Counters of the programs that have computed a part of a tile: int32, all 0 between products.

    Products that share counters must run one after the other, as in one stream.
    """
    return torch.zeros(MOST_ARRIVALS, dtype=torch.int32, device=device)


@kernel
def _tile(
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    SWIZZLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rows and outputs of this program's tile."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_outputs, BLOCK_N)
    program = tl.program_id(0)
    first_m = program // (SWIZZLE * tiles_n) * SWIZZLE
    width = tl.minimum(tiles_m - first_m, SWIZZLE)
    within = program % (SWIZZLE * tiles_n)
    row = (first_m + within % width) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, within // width * BLOCK_N + tl.arange(0, BLOCK_N)


@kernel
def _store(
    out: tl.tensor,
    acc: tl.tensor,
    at: tl.tensor,
    valid: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    output_O: tl.tensor,
    num_outputs: tl.tensor,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Store sums times the scales of int8 and float8 rows, plus the bias."""
    valid_O = output_O < num_outputs
    if KIND == "int8" or KIND == "fp8":
        acc *= tl.load(scales + output_O, mask=valid_O, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + output_O, mask=valid_O, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid)


@kernel
def _is_last(arrivals: tl.tensor) -> tl.tensor:
    """Whether all other programs of the tile have stored their parts, which are then visible."""
    tl.debug_barrier()  # all threads have stored before the program counts as arrived
    counter = arrivals + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1 == tl.num_programs(1)
    if last:
        tl.store(counter, 0)  # for the next product
    tl.debug_barrier()  # no thread reads parts before the count was seen
    return last


@kernel
def _matmul(
    x: tl.tensor,
    data: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    num_steps: tl.tensor,
    part_steps: tl.tensor,
    SPLIT: tl.constexpr,
    SWIZZLE: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """The product; a part of the columns has `part_steps` steps.

    "programs": program (tile, i) stores part i in `parts`, float32 [parts, rows, outputs], and the
    last program of a tile adds the parts. "in turn": a program computes and adds all parts.
    """
    row, output = _tile(num_rows, num_outputs, SWIZZLE, BLOCK_M, BLOCK_N)
    row_M = tl.minimum(row, num_rows - 1).to(tl.int64) * x_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in range(0, tl.cdiv(num_steps, part_steps) if SPLIT == "in turn" else 1):
        first = (tl.program_id(1) + part) * part_steps
        stop = tl.minimum(first + part_steps, num_steps)
        acc += multiply(x, row_M, row_M, data, scales, zeros, output, num_outputs, num_inputs,
                        first, stop, KIND, GROUP, PLANES, BLOCKS, HAS_ZEROS, False, EVEN,
                        BLOCK_M, BLOCK_N, BLOCK_K, DOT)  # fmt: skip
    at = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    valid = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
    if SPLIT == "programs":
        size = num_rows.to(tl.int64) * num_outputs
        tl.store(parts + tl.program_id(1) * size + at, acc, mask=valid)
        if _is_last(arrivals):
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in range(0, tl.num_programs(1)):
                at_other = parts + other * size + at
                acc += tl.load(at_other, mask=valid, other=0.0, cache_modifier=".cg")
            _store(out, acc, at, valid, scales, bias, output, num_outputs, KIND, HAS_BIAS)
    else:
        _store(out, acc, at, valid, scales, bias, output, num_outputs, KIND, HAS_BIAS)


@kernel
def _grouped_matmul(
    x: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    scores: tl.tensor,
    data_table: tl.tensor,
    scales_table: tl.tensor,
    zeros_table: tl.tensor,
    out: tl.tensor,
    num_experts: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    num_steps: tl.tensor,
    STORED: tl.constexpr,
    SCALE: tl.constexpr,
    PERMUTES: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    expert, tile = find_tile(starts, tl.program_id(1), num_experts, BLOCK_M)
    first_row = tl.load(starts + expert) + tile * BLOCK_M
    stop_row = tl.load(starts + expert + 1)
    if first_row >= stop_row:
        return
    row = first_row + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    data = tl.load(data_table + expert).to(tl.pointer_type(STORED))
    data = tl.multiple_of(data, 16)
    scales, zeros = scales_table, zeros_table
    if KIND != "dense":
        scales = tl.load(scales_table + expert).to(tl.pointer_type(SCALE))
    if HAS_ZEROS:
        zeros = tl.load(zeros_table + expert).to(tl.pointer_type(SCALE))
    source = tl.minimum(row, stop_row - 1)
    score = row
    if PERMUTES:
        score = tl.load(scores + source).to(x.dtype.element_ty).to(tl.float32)
        source = tl.load(tokens + source)
    row_M = source.to(tl.int64) * x_stride
    acc = multiply(x, row_M, score, data, scales, zeros, output, num_outputs, num_inputs,
                   0, num_steps, KIND, GROUP, PLANES, BLOCKS, HAS_ZEROS, PERMUTES, EVEN,
                   BLOCK_M, BLOCK_N, BLOCK_K, DOT)  # fmt: skip
    at = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    valid = (row < stop_row)[:, None] & (output < num_outputs)[None, :]
    _store(out, acc, at, valid, scales, scales, output, num_outputs, KIND, False)


def matmul(
    x_MI: Tensor,
    w: Packed,
    *,
    arrivals: Tensor,
    batch_independent: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product x Wᵀ + b: [M, O], in `out_dtype`, or for None in x's dtype.

    Args:
        x_MI: the inputs.
        w: the weights.
        arrivals: counters of `make_arrivals`.
        batch_independent: use the same blocks and parts for any number of rows.
        out_dtype: dtype of the result.
    """
    x_MI = unit_stride(x_MI)
    rows, outputs, device = x_MI.shape[0], w.out_features, x_MI.device
    out = torch.empty(rows, outputs, dtype=out_dtype or x_MI.dtype, device=device)
    if not rows:
        return out
    blocks = matmul_blocks(
        device, w.kind, outputs, w.in_features, None if batch_independent else rows
    )
    constants, step = _constants(w, blocks)
    steps = -(-w.in_features // step)
    tiles = -(-rows // blocks.block_m) * -(-outputs // blocks.block_n)
    split, part_steps = _split(w, blocks, tiles, steps, batch_independent)
    num_parts = -(-steps // part_steps) if split == "programs" else 1
    parts = out
    if split == "programs":
        parts = torch.empty(num_parts, rows, outputs, dtype=torch.float32, device=device)
    _matmul[(tiles, num_parts)](
        x_MI,
        w.data,
        w.scales,
        w.zeros,
        w.bias,
        out,
        parts,
        arrivals,
        rows,
        outputs,
        w.in_features,
        x_MI.stride(0),
        steps,
        part_steps,
        SPLIT=split,
        SWIZZLE=SWIZZLE,
        HAS_BIAS=w.bias is not None,
        **constants,
        **EXACT,
    )
    return out


def _split(
    w: Packed, blocks: MatmulBlocks, tiles: int, steps: int, batch_independent: bool
) -> tuple[Split, int]:
    """Who adds the parts of the columns, and steps of a part.

    Parts do not depend on the number of rows where rows must not depend on others. With many rows
    there are tiles enough, and a program computes all parts of its tile in turn.
    """
    rule = tuning.split_rule(w.data.device)
    shared = -(-w.out_features // blocks.block_n) if batch_independent else tiles
    part_steps = -(-steps // tuning.num_splits(rule, shared, w.in_features))
    if part_steps == steps:
        return "whole", steps
    if tiles < min(rule.processors, MOST_ARRIVALS):
        return "programs", part_steps
    return "in turn", part_steps


def grouped_matmul(
    x: Tensor,
    experts: ExpertWeights,
    starts_E1: Tensor,
    num_rows: int,
    *,
    tokens_X: Tensor | None = None,
    scores_X: Tensor | None = None,
    batch_independent: bool,
) -> Tensor:
    """Rows starts[e] .. starts[e + 1] times the e-th matrix: [num_rows, O].

    Args:
        x: [X, I]; or with `tokens_X` [T, I]: input row r is then x[tokens[r]] times scores[r].
        experts: the matrices.
        starts_E1: int32 [E + 1]; rows from starts[E] on are not written.
        num_rows: at least starts[E]; only the device knows starts[E].
        tokens_X: int32, the token of each row; None for rows that are sorted already.
        scores_X: float32, the score of each row; given with `tokens_X`.
        batch_independent: use the same blocks for any number of rows.
    """
    x = unit_stride(x)
    w = experts.first
    # Nothing reads the rows past the last; but the interpreter's numpy warns of arbitrary numbers
    # in memory, and a GPU does not.
    allocate = torch.zeros if INTERPRETED else torch.empty
    out = allocate(num_rows, w.out_features, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    typical = None if batch_independent else -(-num_rows // experts.count)
    blocks = matmul_blocks(x.device, w.kind, w.out_features, w.in_features, typical)
    tiles = num_rows // blocks.block_m + experts.count
    constants, step = _constants(w, blocks)
    _grouped_matmul[(-(-w.out_features // blocks.block_n), tiles)](
        x,
        starts_E1,
        tokens_X,
        scores_X,
        experts.data,
        experts.scales,
        experts.zeros,
        out,
        experts.count,
        w.out_features,
        w.in_features,
        x.stride(0),
        -(-w.in_features // step),
        STORED=_STORAGE_TYPES[w.data.dtype],
        SCALE=None if w.scales is None else _STORAGE_TYPES[w.scales.dtype],
        PERMUTES=tokens_X is not None,
        **constants,
        **EXACT,
    )
    return out


_STORAGE_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def _constants(w: Packed, blocks: MatmulBlocks) -> tuple[dict[str, Any], int]:
    """Constants of a kernel, and columns of a step."""
    block_k, step, fits = blocks.block_k, blocks.block_k, True
    planes, step_blocks = 0, 1
    if w.form is not None:
        planes, words = w.form.planes, w.form.words
        columns = w.group_size * w.form.groups
        step_blocks = max(1, blocks.block_k // columns)
        step = columns * step_blocks
        block_k = min(MOST_WORDS, power_of_two(words, 16))
        fits = planes * words == w.group_size and words % block_k == 0
    constants = {
        "KIND": w.kind,
        "GROUP": 0 if w.form is None else w.group_size,
        "PLANES": planes,
        "BLOCKS": step_blocks,
        "HAS_ZEROS": w.zeros is not None,
        "EVEN": fits and w.in_features % step == 0,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "BLOCK_K": block_k,
        "DOT": dot_type(w.data.dtype if w.form is None else torch.int8),
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }
    return constants, step

"""Matrix products with weights of any kind, and grouped products for the sorted rows of experts.

y[m, o] = sum over i of x[m, i] * W[o, i], in float32, columns in ascending order: the sum of a row
depends on the shape of the weights alone, if the blocks do. Kernels multiply the levels of
quantized weights directly (exact in bfloat16) and apply scales to float32 sums. Knows packed
weights; knows nothing of layers.

Shape legend: M rows, O outputs, I inputs, K inputs of a step, E experts, X sorted rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton.language as tl
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
from arriero.kernels.triton.tuning import MatmulBlocks, matmul_blocks
from arriero.kernels.triton.weights import Packed

SWIZZLE = 8
"""Tiles of rows that use the same tile of weights while the L2 cache has the tile."""


@kernel
def _load_x(
    x: tl.tensor,
    row_M: tl.tensor,
    valid_M: tl.tensor,
    column_K: tl.tensor,
    valid_K: tl.tensor,
    score_M: tl.tensor,
    SCORED: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Inputs [M, K]; a row times its score is rounded to the dtype of x."""
    value = tl.load(
        x + row_M[:, None] + column_K[None, :],
        mask=valid_M[:, None] & valid_K[None, :],
        other=0.0,
    )
    if SCORED:
        value = (value.to(tl.float32) * score_M[:, None]).to(x.dtype.element_ty)
    return value.to(DOT)


@kernel
def _fp4_value(code: tl.tensor) -> tl.tensor:
    """Float32 numbers of e2m1 codes 0 .. 15."""
    magnitude = (code & 7).to(tl.int32)
    shift = tl.maximum(magnitude >> 1, 1) - 1
    doubled = tl.where(magnitude < 2, magnitude, (2 + (magnitude & 1)) << shift)
    value = doubled.to(tl.float32) * 0.5
    return tl.where(code >= 8, -value, value)


@kernel
def _multiply(
    x: tl.tensor,
    row_M: tl.tensor,
    valid_M: tl.tensor,
    score_M: tl.tensor,
    data: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    output_O: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SCORED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """A tile [M, O] of x Wᵀ in float32; `row_M` are offsets of rows, in elements."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    valid_O = output_O < num_outputs
    output64_O = output_O.to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    if KIND == "int4" or KIND == "fp4":
        HALF: tl.constexpr = (GROUP + 1) // 2
        num_groups = (num_inputs + GROUP - 1) // GROUP
        for group in range(0, num_groups):
            part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total_M = tl.zeros([BLOCK_M], tl.float32)
            for first in tl.static_range(0, HALF, BLOCK_K):
                j = first + k
                low = group * GROUP + j
                high = low + HALF
                low_K = (j < HALF) & (low < num_inputs)
                high_K = (j < HALF) & (j + HALF < GROUP) & (high < num_inputs)
                at = data + output64_O[:, None] * (num_groups * HALF) + (group * HALF + j)[None, :]
                both = tl.load(at, mask=valid_O[:, None] & low_K[None, :], other=0)
                x_low = _load_x(x, row_M, valid_M, low, low_K, score_M, SCORED, DOT)
                x_high = _load_x(x, row_M, valid_M, high, high_K, score_M, SCORED, DOT)
                q_low, q_high = both & 15, both >> 4
                if KIND == "fp4":
                    q_low, q_high = _fp4_value(q_low).to(DOT), _fp4_value(q_high).to(DOT)
                elif HAS_ZEROS:
                    total_M += tl.sum(x_low.to(tl.float32), 1) + tl.sum(x_high.to(tl.float32), 1)
                    q_low, q_high = q_low.to(DOT), q_high.to(DOT)
                else:
                    q_low = (q_low.to(tl.int8) - 8).to(DOT)
                    q_high = (q_high.to(tl.int8) - 8).to(DOT)
                part = tl.dot(x_low, tl.trans(q_low), part, input_precision="ieee")
                part = tl.dot(x_high, tl.trans(q_high), part, input_precision="ieee")
            at_O = output64_O * num_groups + group
            if HAS_ZEROS:
                zero_O = tl.load(zeros + at_O, mask=valid_O, other=0.0)
                part -= total_M[:, None] * zero_O[None, :]
            acc += part * tl.load(scales + at_O, mask=valid_O, other=0.0)[None, :]
    else:
        for first in range(0, num_inputs, BLOCK_K):
            column = first + k
            valid_K = column < num_inputs
            x_MK = _load_x(x, row_M, valid_M, column, valid_K, score_M, SCORED, DOT)
            w_OK = tl.load(
                data + output64_O[:, None] * num_inputs + column[None, :],
                mask=valid_O[:, None] & valid_K[None, :],
                other=0.0,
            ).to(DOT)
            acc = tl.dot(x_MK, tl.trans(w_OK), acc, input_precision="ieee")
        if KIND != "dense":
            acc *= tl.load(scales + output_O, mask=valid_O, other=0.0)[None, :]
    return acc


@kernel
def _matmul(
    x: tl.tensor,
    data: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_outputs, BLOCK_N)
    program = tl.program_id(0)
    first_m = program // (SWIZZLE * tiles_n) * SWIZZLE
    width = tl.minimum(tiles_m - first_m, SWIZZLE)
    within = program % (SWIZZLE * tiles_n)
    row = (first_m + within % width) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = within // width * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_row = row < num_rows
    acc = _multiply(
        x,
        row.to(tl.int64) * x_stride,
        valid_row,
        valid_row,
        data,
        scales,
        zeros,
        output,
        num_outputs,
        num_inputs,
        KIND,
        GROUP,
        HAS_ZEROS,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
    )
    valid_output = output < num_outputs
    if HAS_BIAS:
        acc += tl.load(bias + output, mask=valid_output, other=0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=valid_row[:, None] & valid_output[None, :])


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
    KIND: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    PERMUTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    expert, tile = find_tile(starts, tl.program_id(1), num_experts, BLOCK_M)
    row = tl.load(starts + expert) + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    stop = tl.load(starts + expert + 1)
    if tl.load(starts + expert) + tile * BLOCK_M >= stop:
        return
    valid_row = row < stop
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    data = tl.load(data_table + expert).to(tl.pointer_type(STORED))
    data = tl.multiple_of(data, 16)
    scales, zeros = scales_table, zeros_table
    if KIND != "dense":
        scales = tl.load(scales_table + expert).to(tl.pointer_type(tl.float32))
    if HAS_ZEROS:
        zeros = tl.load(zeros_table + expert).to(tl.pointer_type(tl.float32))
    source, score = row, valid_row
    if PERMUTES:
        source = tl.load(tokens + row, mask=valid_row, other=0)
        score = tl.load(scores + row, mask=valid_row, other=0.0)
        score = score.to(x.dtype.element_ty).to(tl.float32)
    acc = _multiply(
        x,
        source.to(tl.int64) * x_stride,
        valid_row,
        score,
        data,
        scales,
        zeros,
        output,
        num_outputs,
        num_inputs,
        KIND,
        GROUP,
        HAS_ZEROS,
        PERMUTES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
    )
    to = out + row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    valid = valid_row[:, None] & (output < num_outputs)[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=valid)


def matmul(
    x_MI: Tensor, w: Packed, *, batch_independent: bool, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The product x Wᵀ + b: [M, O], in `out_dtype`, or for None in x's dtype."""
    x_MI = unit_stride(x_MI)
    rows, outputs = x_MI.shape[0], w.out_features
    out = torch.empty(rows, outputs, dtype=out_dtype or x_MI.dtype, device=x_MI.device)
    if not rows:
        return out
    blocks = matmul_blocks(
        x_MI.device, w.kind, outputs, w.in_features, None if batch_independent else rows
    )
    _matmul[(-(-rows // blocks.block_m) * -(-outputs // blocks.block_n),)](
        x_MI,
        w.data,
        w.scales,
        w.zeros,
        w.bias,
        out,
        rows,
        outputs,
        w.in_features,
        x_MI.stride(0),
        HAS_BIAS=w.bias is not None,
        SWIZZLE=SWIZZLE,
        **_constants(w, blocks),
        **EXACT,
    )
    return out


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
        STORED=_STORAGE_TYPES[w.data.dtype],
        PERMUTES=tokens_X is not None,
        **_constants(w, blocks),
        **EXACT,
    )
    return out


_STORAGE_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def _constants(w: Packed, blocks: MatmulBlocks) -> dict[str, Any]:
    block_k = blocks.block_k
    if w.kind == "int4" or w.kind == "fp4":
        block_k = min(block_k, power_of_two(-(-w.group_size // 2), 16))
    return {
        "KIND": w.kind,
        "GROUP": w.group_size,
        "HAS_ZEROS": w.zeros is not None,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "BLOCK_K": block_k,
        "DOT": dot_type(w.data.dtype),
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }

"""Float8 (e4m3) from float32 and back, and rows of float8 with a scale for each row.

`store_rounded` is for kernels that round the rows that they make; `quantize_rows` rounds other rows
by a launch of its own, with the same bits.

Integer arithmetic on the bits rounds to nearest even: the interpreter's conversion rounds
otherwise, and the conversion of a GPU depends on its generation. Knows numbers; knows nothing of
weights.

Shape legend: T rows, I columns, E experts, X rows sorted by expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.quantized_weight import FP8_MAX
from arriero.kernels.triton.launch import (
    EXACT,
    kernel,
    power_of_two,
    rows_per_program,
    unit_stride,
)

BLOCK = 8192
"""Columns of a pass, 32 for each thread: 53,248 columns at once would not fit the registers."""

_FP8_MAX = tl.constexpr(FP8_MAX)
_NAN = tl.constexpr(0x7F)
_BIAS = tl.constexpr(120 << 3)
"""Difference between the exponents of float32 and e4m3, above three bits of fraction."""


@kernel
def fp8_bits(value: tl.tensor) -> tl.tensor:
    """E4m3 bits of float32 numbers up to magnitude 448, rounded to nearest even; else NaN."""
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - _BIAS
    # Below 2**-6 levels are 2**-9 apart: 2**23 plus the index of a level has it in the last bits.
    count = magnitude.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
    small = count.to(tl.int32, bitcast=True) & 0xF
    level = tl.where(magnitude < 0x3C800000, small, normal)
    return sign | tl.where(level < _NAN, level, _NAN)


@kernel
def bf16_bits(value: tl.tensor) -> tl.tensor:
    """Bfloat16 bits of float32 numbers, rounded to nearest even, in the low half of an int32."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    return tl.where(value == value, rounded, 0x7FC0)


@kernel
def fp8_value(byte: tl.tensor) -> tl.tensor:
    """Float32 numbers of e4m3 bits in int32."""
    magnitude = byte & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == _NAN, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@kernel
def row_scale(greatest: tl.tensor, bound: tl.tensor, BOUNDED: tl.constexpr) -> tl.tensor:
    """Scales of rows by their greatest magnitudes: the magnitude / 448, and 1 for a row of 0."""
    if BOUNDED:
        greatest = tl.minimum(greatest, bound)
    scale = tl.div_rn(greatest, tl.zeros_like(greatest) + _FP8_MAX)
    return tl.where(scale == 0, 1.0, scale)


@kernel
def scaled_bits(value: tl.tensor, scale: tl.tensor, CLAMPS: tl.constexpr) -> tl.tensor:
    """E4m3 bits of value / scale in uint8; scales have the shape of the values.

    Args:
        value: float32.
        scale: float32.
        CLAMPS: quotients beyond 448 become 448, and NaN stays NaN; else there are no such.
    """
    level = tl.div_rn(value, scale)
    if CLAMPS:
        level = tl.where(level > _FP8_MAX, _FP8_MAX, level)
        level = tl.where(level < -_FP8_MAX, -_FP8_MAX, level)
    return fp8_bits(level).to(tl.uint8)


@kernel
def store_rounded(
    value: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    valid_row: tl.tensor,
    valid: tl.tensor,
    size: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    bound: tl.tensor,
    STATIC: tl.constexpr,
    BOUNDED: tl.constexpr,
) -> None:
    """Round whole rows, and store their levels and scales.

    Args:
        value: float32 [rows, columns]; 0 in columns that are not `valid`.
        row: int64 [rows, 1].
        column: [1, columns].
        valid_row: [rows, 1].
        valid: [rows, columns].
        size: columns of a row in `levels`.
        levels: address of the rows' levels.
        scales: address of the rows' scales.
        static_scale: address of the scale of all rows, if STATIC.
        bound: largest scale of a row times 448, if BOUNDED.
        STATIC: all rows have the same scale, which is given.
        BOUNDED: scales of rows have a bound.
    """
    if STATIC:
        scale = tl.zeros_like(row).to(tl.float32) + tl.load(static_scale)
    else:
        scale = row_scale(tl.max(tl.abs(value), 1, keep_dims=True), bound, BOUNDED)
    tl.store(scales + row, scale, mask=valid_row)
    bits = scaled_bits(value, tl.broadcast_to(scale, value.shape), STATIC or BOUNDED)
    tl.store(levels + row * size + column, bits, mask=valid)


@kernel
def _load_row(
    at: tl.tensor,
    valid: tl.tensor,
    score: tl.tensor,
    PERMUTES: tl.constexpr,
) -> tl.tensor:
    """Inputs in float32; a row times its score is rounded to the dtype of the inputs."""
    stored = at.dtype.element_ty
    value = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    if PERMUTES:
        value = value * score[:, None]
        if stored == tl.bfloat16:
            value = (bf16_bits(value) << 16).to(tl.float32, bitcast=True)
        else:
            value = value.to(stored).to(tl.float32)
    return value


@kernel
def _quantize_rows(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    scores: tl.tensor,
    bound: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    BOUNDED: tl.constexpr,
    SORTED: tl.constexpr,
    PERMUTES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    if SORTED:  # only the device knows the number of rows
        valid_row = valid_row & (row < tl.load(starts + num_experts))
    source, score = row, valid_row
    if PERMUTES:
        source = tl.load(tokens + row, mask=valid_row, other=0)
        score = tl.load(scores + row, mask=valid_row, other=0.0)
        if x.dtype.element_ty == tl.bfloat16:
            score = (bf16_bits(score) << 16).to(tl.float32, bitcast=True)
        else:
            score = score.to(x.dtype.element_ty).to(tl.float32)
    from_row = x + source.to(tl.int64)[:, None] * x_stride
    to_row = out + row.to(tl.int64)[:, None] * size
    greatest = tl.zeros([ROWS], tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        valid = valid_row[:, None] & (column < size)
        value = _load_row(from_row + column, valid, score, PERMUTES)
        greatest = tl.maximum(greatest, tl.max(tl.abs(value), 1))
    scale = row_scale(greatest, bound, BOUNDED)
    for first in range(0, size, BLOCK):  # the second read comes from the caches
        column = first + tl.arange(0, BLOCK)[None, :]
        valid = valid_row[:, None] & (column < size)
        value = _load_row(from_row + column, valid, score, PERMUTES)
        bits = scaled_bits(value, tl.broadcast_to(scale[:, None], [ROWS, BLOCK]), BOUNDED)
        tl.store(to_row + column, bits, mask=valid)
    tl.store(scales + row, scale, mask=valid_row)


def quantize_rows(x_TI: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """See `kernels.input_transform.quantize_rows`."""
    return _quantized(x_TI, bound, x_TI.shape[0], None, None, None)


def quantize_expert_rows(
    x: Tensor,
    bound: float,
    starts_E1: Tensor,
    num_rows: int,
    *,
    tokens_X: Tensor | None = None,
    scores_X: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, for rows sorted by expert, in one launch.

    Args:
        x: [X, I]; or with `tokens_X` [T, I]: row r is then x[tokens[r]] times scores[r], with the
            score and the result rounded to the dtype of x.
        bound: largest scale times 448; inf for no bound.
        starts_E1: int32 [E + 1]; rows from starts[E] on are neither read nor written.
        num_rows: at least starts[E]; only the device knows starts[E].
        tokens_X: int32, the token of each row; None for rows that are sorted already.
        scores_X: float32, the score of each row; given with `tokens_X`.

    Returns:
        Levels float8_e4m3fn [num_rows, I], scales float32 [num_rows, 1].
    """
    return _quantized(x, bound, num_rows, starts_E1, tokens_X, scores_X)


def _quantized(
    x_TI: Tensor,
    bound: float,
    count: int,
    starts_E1: Tensor | None,
    tokens_X: Tensor | None,
    scores_X: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x_TI = unit_stride(x_TI)
    size = x_TI.shape[1]
    out_TI = torch.empty(count, size, dtype=torch.uint8, device=x_TI.device)
    scale_T1 = torch.empty(count, 1, dtype=torch.float32, device=x_TI.device)
    block = min(BLOCK, power_of_two(size))
    rows = power_of_two(rows_per_program(block))
    if count:
        _quantize_rows[(-(-count // rows),)](
            x_TI,
            out_TI,
            scale_T1,
            starts_E1,
            tokens_X,
            scores_X,
            bound,
            count,
            0 if starts_E1 is None else starts_E1.shape[0] - 1,
            size,
            x_TI.stride(0),
            BOUNDED=math.isfinite(bound),
            SORTED=starts_E1 is not None,
            PERMUTES=tokens_X is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            **EXACT,
        )
    return out_TI.view(torch.float8_e4m3fn), scale_T1

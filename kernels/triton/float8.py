"""Float8 (e4m3) from float32 and back, and rows of float8 with a scale for each row.

Integer arithmetic on the bits rounds to nearest even: the interpreter's conversion rounds
otherwise, and the conversion of a GPU depends on its generation. Knows numbers; knows nothing of
weights.

Shape legend: T rows, I columns.
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
def fp8_value(byte: tl.tensor) -> tl.tensor:
    """Float32 numbers of e4m3 bits in int32."""
    magnitude = byte & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == _NAN, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


@kernel
def _quantize_rows(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    bound: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid_row = row < num_rows
    row64 = row.to(tl.int64)[:, None]
    greatest = tl.zeros([ROWS], tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        valid = valid_row[:, None] & (column < size)
        value = tl.load(x + row64 * x_stride + column, mask=valid, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.max(tl.abs(value), 1))
    if BOUNDED:
        greatest = tl.minimum(greatest, bound)
    scale = tl.div_rn(greatest, tl.full([ROWS], _FP8_MAX, tl.float32))
    scale = tl.where(scale == 0, 1.0, scale)
    for first in range(0, size, BLOCK):  # the second read comes from the caches
        column = first + tl.arange(0, BLOCK)[None, :]
        valid = valid_row[:, None] & (column < size)
        value = tl.load(x + row64 * x_stride + column, mask=valid, other=0.0).to(tl.float32)
        level = tl.div_rn(value, tl.broadcast_to(scale[:, None], [ROWS, BLOCK]))
        if BOUNDED:  # NaN stays NaN
            level = tl.where(level > _FP8_MAX, _FP8_MAX, level)
            level = tl.where(level < -_FP8_MAX, -_FP8_MAX, level)
        tl.store(out + row64 * size + column, fp8_bits(level).to(tl.uint8), mask=valid)
    tl.store(scales + row, scale, mask=valid_row)


def quantize_rows(x_TI: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """See `kernels.input_transform.quantize_rows`."""
    x_TI = unit_stride(x_TI)
    count, size = x_TI.shape
    out_TI = torch.empty(count, size, dtype=torch.uint8, device=x_TI.device)
    scale_T1 = torch.empty(count, 1, dtype=torch.float32, device=x_TI.device)
    block = min(BLOCK, power_of_two(size))
    rows = power_of_two(rows_per_program(block))
    if count:
        _quantize_rows[(-(-count // rows),)](
            x_TI,
            out_TI,
            scale_T1,
            bound,
            count,
            size,
            x_TI.stride(0),
            BOUNDED=math.isfinite(bound),
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            **EXACT,
        )
    return out_TI.view(torch.float8_e4m3fn), scale_T1

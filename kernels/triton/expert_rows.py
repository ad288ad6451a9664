"""Rows gathered, scaled and rounded into the bytes that travel between ranks, and back.

The bytes are as `kernels.expert_rows` defines, in the interpreter too (see `float8`). Each way is a
single pass over a row. Knows rows; knows nothing of ranks.

Shape legend: X sent rows, Y unpacked rows, H hidden size, B bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.expert_rows import MIN_AMAX, RowFormat, row_bytes
from arriero.kernels.quantized_weight import FP8_MAX
from arriero.kernels.triton.float8 import bf16_bits, fp8_bits, fp8_value
from arriero.kernels.triton.launch import EXACT, kernel, power_of_two, rows_per_program, unit_stride

_FP8_MAX = tl.constexpr(FP8_MAX)
_MIN_AMAX = tl.constexpr(MIN_AMAX)


@kernel
def _pack(
    x: tl.tensor,
    rows: tl.tensor,
    scores: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    SCORED: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    valid_row = row < num_rows
    valid = valid_row[:, None] & (column < size)
    source = tl.load(rows + row, mask=valid_row, other=0).to(tl.int64)[:, None]
    value = tl.load(x + source * x_stride + column, mask=valid, other=0.0).to(tl.float32)
    if SCORED:
        value = value * tl.load(scores + row, mask=valid_row, other=0.0)[:, None]
    row64 = row.to(tl.int64)[:, None]
    if FORMAT == "fp8":
        amax = tl.max(tl.abs(value), 1)
        amax = tl.where(amax < _MIN_AMAX, _MIN_AMAX, amax)
        has_nan = tl.max((value != value).to(tl.int32), 1) > 0
        scale = tl.div_rn(amax, tl.full([ROWS], _FP8_MAX, tl.float32))
        scale = tl.where(has_nan, float("nan"), scale)
        level = fp8_bits(tl.div_rn(value, tl.broadcast_to(scale[:, None], [ROWS, BLOCK])))
        at = out + row64 * (size + 4)
        tl.store(at + column, level.to(tl.uint8), mask=valid)
        byte = tl.arange(0, 4)[None, :]
        part = (scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)) & 0xFF
        tl.store(at + size + byte, part.to(tl.uint8), mask=valid_row[:, None] & (byte < 4))
    elif FORMAT == "bfloat16":
        tl.store(out + row64 * size + column, bf16_bits(value).to(tl.int16), mask=valid)
    else:
        tl.store(out + row64 * size + column, value, mask=valid)


@kernel
def _unpack(
    packed: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    valid_row = row < num_rows
    valid = valid_row[:, None] & (column < size)
    source = tl.load(rows + row, mask=valid_row, other=0).to(tl.int64)[:, None]
    if FORMAT == "fp8":
        at = packed + source * (size + 4)
        value = fp8_value(tl.load(at + column, mask=valid, other=0).to(tl.int32))
        byte = tl.arange(0, 4)[None, :]
        part = tl.load(at + size + byte, mask=valid_row[:, None] & (byte < 4), other=0).to(tl.int32)
        scale = tl.sum(part << (8 * byte), 1).to(tl.float32, bitcast=True)
        value = value * scale[:, None]
    elif FORMAT == "bfloat16":
        half = tl.load(packed + source * size + column, mask=valid, other=0).to(tl.int32)
        value = (half << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(packed + source * size + column, mask=valid, other=0.0)
    at = out + row.to(tl.int64)[:, None] * size + column
    tl.store(at, value.to(out.dtype.element_ty), mask=valid)


_STORAGE = {"float32": torch.float32, "bfloat16": torch.int16, "fp8": torch.uint8}


def pack(x_TH: Tensor, row_X: Tensor, score_X: Tensor | None, format: RowFormat) -> Tensor:
    """See `Ops.pack_rows`."""
    x_TH = unit_stride(x_TH)
    count, size = row_X.shape[0], x_TH.shape[1]
    out_XB = torch.empty(count, row_bytes(size, format), dtype=torch.uint8, device=x_TH.device)
    block = power_of_two(size)
    rows = power_of_two(rows_per_program(block))
    if count:
        _pack[(-(-count // rows),)](
            x_TH,
            row_X.contiguous(),
            None if score_X is None else score_X.float().contiguous(),
            out_XB.view(_STORAGE[format]),
            count,
            size,
            x_TH.stride(0),
            SCORED=score_X is not None,
            FORMAT=format,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            **EXACT,
        )
    return out_XB


def unpack(
    rows_XB: Tensor, row_Y: Tensor, size: int, format: RowFormat, dtype: torch.dtype
) -> Tensor:
    """See `Ops.unpack_rows`."""
    rows_XB = rows_XB.contiguous()
    count = row_Y.shape[0]
    out_YH = torch.empty(count, size, dtype=dtype, device=rows_XB.device)
    block = power_of_two(size)
    rows = power_of_two(rows_per_program(block))
    if count:
        _unpack[(-(-count // rows),)](
            rows_XB.view(_STORAGE[format]),
            row_Y.contiguous(),
            out_YH,
            count,
            size,
            FORMAT=format,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            **EXACT,
        )
    return out_YH

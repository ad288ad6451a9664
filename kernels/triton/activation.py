"""SwiGLU: silu of the gate half times the up half, as numbers or rounded to float8.

Knows rows of numbers; knows nothing of layers. Shape legend: T tokens, F MLP columns of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.rounded_rows import RoundedRows, Rounding
from arriero.kernels.triton.float8 import row_scale, scaled_bits
from arriero.kernels.triton.launch import (
    EXACT,
    INTERPRETED,
    kernel,
    power_of_two,
    rows_per_program,
    unit_stride,
)
from arriero.kernels.triton.rows_out import rows_out

BLOCK = 1024
ROUNDED_BLOCK = 4096
"""Columns of a pass over a row that is rounded: 16 for each of 256 threads."""


@kernel
def _gated(at: tl.tensor, size: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """Silu of the gates times the numbers `size` columns on, in the dtype of both."""
    gate = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=valid, other=0.0).to(tl.float32)
    # exp of minus the magnitude cannot overflow; both forms of the sigmoid agree at 0
    small = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    stored = at.dtype.element_ty
    activated = (gate * sigmoid).to(stored).to(tl.float32)
    return (activated * up).to(stored)


@kernel
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    valid = (row < num_rows) & (column < size)
    value = _gated(gate_up + row * stride + column, size, valid)
    tl.store(out + row * size + column, value, mask=valid)


@kernel
def _silu_mul_rounded(
    gate_up: tl.tensor,
    starts: tl.tensor,
    num_rows: tl.tensor,
    num_experts: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    bound: tl.tensor,
    SORTED: tl.constexpr,
    STATIC: tl.constexpr,
    BOUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    valid_row = row < num_rows
    if SORTED:  # only the device knows the number of rows
        valid_row = valid_row & (row < tl.load(starts + num_experts))
    if STATIC:
        scale = tl.zeros([ROWS, 1], tl.float32) + tl.load(static_scale)
    else:
        greatest = tl.zeros([ROWS, 1], tl.float32)
        for first in range(0, size, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            valid = valid_row & (column < size)
            value = _gated(gate_up + row * stride + column, size, valid).to(tl.float32)
            greatest = tl.maximum(greatest, tl.max(tl.abs(value), 1, keep_dims=True))
        scale = row_scale(greatest, bound, BOUNDED)
    tl.store(scales + row, scale, mask=valid_row)
    for first in range(0, size, BLOCK):  # a second read comes from the caches
        column = first + tl.arange(0, BLOCK)[None, :]
        valid = valid_row & (column < size)
        value = _gated(gate_up + row * stride + column, size, valid).to(tl.float32)
        bits = scaled_bits(value, tl.broadcast_to(scale, [ROWS, BLOCK]), STATIC or BOUNDED)
        tl.store(levels + row * size + column, bits, mask=valid)


def silu_mul(gate_up_TF2: Tensor) -> Tensor:
    """See `Ops.silu_mul`."""
    gate_up_TF2 = unit_stride(gate_up_TF2)
    num_rows, size = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    out_TF = torch.empty(num_rows, size, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    block = power_of_two(size) if INTERPRETED else min(BLOCK, power_of_two(size))
    rows = power_of_two(rows_per_program(block))
    if num_rows:
        _silu_mul[(-(-num_rows // rows), -(-size // block))](
            gate_up_TF2,
            out_TF,
            num_rows,
            gate_up_TF2.stride(0),
            size,
            ROWS=rows,
            BLOCK=block,
            **EXACT,
        )
    return out_TF


def silu_mul_rounded(
    gate_up_TF2: Tensor, rounding: Rounding, starts_E1: Tensor | None = None
) -> RoundedRows:
    """`silu_mul`, rounded to float8 in the same launch; nobody else reads the rows.

    Args:
        gate_up_TF2: [T, 2F].
        rounding: of the product that reads the rows.
        starts_E1: int32 [E + 1], for rows sorted by expert: rows from starts[E] on are neither read
            nor written. None for all rows.
    """
    gate_up_TF2 = unit_stride(gate_up_TF2)
    num_rows, size = gate_up_TF2.shape[0], gate_up_TF2.shape[1] // 2
    assert not rounding.keeps_rows, "an activation goes into a single product"
    out = rows_out(num_rows, size, gate_up_TF2, rounding)
    block = min(ROUNDED_BLOCK, power_of_two(size))
    rows = power_of_two(rows_per_program(block))
    if num_rows:
        _silu_mul_rounded[(-(-num_rows // rows),)](
            gate_up_TF2,
            starts_E1,
            num_rows,
            0 if starts_E1 is None else starts_E1.shape[0] - 1,
            gate_up_TF2.stride(0),
            size,
            **out.rounding_arguments,
            SORTED=starts_E1 is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=8,
            **EXACT,
        )
    rows_TF = out.result
    assert isinstance(rows_TF, RoundedRows), "the rows are rounded"
    return rows_TF

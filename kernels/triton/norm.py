"""Root-mean-square norm, alone or fused with the residual sum before the norm.

Writes its rows as numbers, or rounded to float8 for the product that reads them, or both. Knows
rows of numbers; knows nothing of layers. Shape legend: T tokens, H hidden size.
"""

from __future__ import annotations

from torch import Tensor

import triton.language as tl
from arriero.kernels.rounded_rows import InputRows, Rounding, unrounded
from arriero.kernels.triton.float8 import store_rounded
from arriero.kernels.triton.launch import EXACT, kernel, power_of_two, rows_per_program, unit_stride
from arriero.kernels.triton.rows_out import rows_out


@kernel
def _rms_norm(
    x: tl.tensor,
    part: tl.tensor,
    weight: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    part_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    out: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    static_scale: tl.tensor,
    bound: tl.tensor,
    ADDS: tl.constexpr,
    KEEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    STATIC: tl.constexpr,
    BOUNDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if ROUNDS:  # else a thread would take as many columns as fill its store of bytes, and the
        column = tl.max_contiguous(column, [1, TOGETHER])  # sum would have another order
    valid = (row < num_rows) & (column < size)
    stored = x.dtype.element_ty
    at = x + row * x_stride + column
    value = tl.load(at, mask=valid, other=0.0)
    if ADDS:
        other = tl.load(part + row * part_stride + column, mask=valid, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(stored)
        tl.store(at, value, mask=valid)
    value = value.to(tl.float32)
    mean = tl.sum(value * value, 1) / size
    # Rounded before the multiplication by the weight, as in the training of the checkpoints.
    normed = (value * tl.rsqrt(mean + eps)[:, None]).to(stored).to(tl.float32)
    gain = tl.load(weight + column, mask=column < size, other=0.0).to(stored).to(tl.float32)
    value = (normed * gain).to(stored)
    if KEEPS:
        tl.store(out + row * size + column, value, mask=valid)
    if ROUNDS:
        store_rounded(
            value.to(tl.float32),
            row,
            column,
            row < num_rows,
            valid,
            size,
            levels,
            scales,
            static_scale,
            bound,
            STATIC,
            BOUNDED,
        )


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`."""
    return unrounded(norm_rows(x_TH, None, weight_H, eps, None))


def add_rms_norm(x_TH: Tensor, part_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Add `part` to `x` in place, and return the norm of the sum.

    The bits are the same as from `x += part` and then `rms_norm`.
    """
    return unrounded(norm_rows(x_TH, part_TH, weight_H, eps, None))


def norm_rows(
    x_TH: Tensor, part_TH: Tensor | None, weight_H: Tensor, eps: float, rounding: Rounding | None
) -> InputRows:
    """The norm of x, or of x and `part`, whose sum is then stored in x: as its readers need it.

    Args:
        x_TH: rows; with `part_TH` the last dimension is contiguous.
        part_TH: rows to add; None for none.
        weight_H: float32.
        eps: added to the mean square.
        rounding: of the product that reads the rows; None for unrounded rows.
    """
    if part_TH is None:
        x_TH = unit_stride(x_TH)
    else:
        assert x_TH.stride(-1) == 1, "the residual stream is updated in place"
        part_TH = unit_stride(part_TH)
    num_rows, size = x_TH.shape
    out = rows_out(num_rows, size, x_TH, rounding)
    block = power_of_two(size)
    rows = rows_per_program(block)
    if num_rows:
        _rms_norm[(-(-num_rows // rows),)](
            x_TH,
            part_TH,
            weight_H,
            num_rows,
            x_TH.stride(0),
            0 if part_TH is None else part_TH.stride(0),
            size,
            eps,
            **out.arguments,
            ADDS=part_TH is not None,
            ROWS=power_of_two(rows),
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            **EXACT,
        )
    return out.result

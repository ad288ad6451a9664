"""Root-mean-square norm, alone or fused with the residual sum before the norm.

Knows rows of numbers; knows nothing of layers. Shape legend: T tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.triton.launch import EXACT, kernel, power_of_two, rows_per_program, unit_stride


@kernel
def _rms_norm(
    x: tl.tensor,
    part: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    part_stride: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
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
    tl.store(out + row * size + column, (normed * gain).to(stored), mask=valid)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`."""
    return _norm(unit_stride(x_TH), None, weight_H, eps)


def add_rms_norm(x_TH: Tensor, part_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Add `part` to `x` in place, and return the norm of the sum.

    The bits are the same as from `x += part` and then `rms_norm`.
    """
    assert x_TH.stride(-1) == 1, "the residual stream is updated in place"
    return _norm(x_TH, unit_stride(part_TH), weight_H, eps)


def _norm(x_TH: Tensor, part_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    num_rows, size = x_TH.shape
    out_TH = torch.empty(num_rows, size, dtype=x_TH.dtype, device=x_TH.device)
    block = power_of_two(size)
    rows = rows_per_program(block)
    if num_rows:
        _rms_norm[(-(-num_rows // rows),)](
            x_TH,
            part_TH,
            weight_H,
            out_TH,
            num_rows,
            x_TH.stride(0),
            0 if part_TH is None else part_TH.stride(0),
            size,
            eps,
            ADDS=part_TH is not None,
            ROWS=power_of_two(rows),
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            **EXACT,
        )
    return out_TH

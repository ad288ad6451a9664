"""SwiGLU: silu of the gate half times the up half.

Knows rows of numbers; knows nothing of layers. Shape legend: T tokens, F MLP columns of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.triton.launch import (
    EXACT,
    INTERPRETED,
    kernel,
    power_of_two,
    rows_per_program,
    unit_stride,
)

BLOCK = 1024


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
    at = gate_up + row * stride + column
    gate = tl.load(at, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=valid, other=0.0).to(tl.float32)
    # exp of minus the magnitude cannot overflow; both forms of the sigmoid agree at 0
    small = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, small) / (1.0 + small)
    stored = out.dtype.element_ty
    activated = (gate * sigmoid).to(stored).to(tl.float32)
    tl.store(out + row * size + column, (activated * up).to(stored), mask=valid)


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

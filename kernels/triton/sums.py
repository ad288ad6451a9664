"""The sum of the ranks' parts of a row-parallel product, in rank order.

One launch for any number of parts, with the bits of one addition after another: each partial sum is
rounded to the parts' dtype. Knows numbers; knows nothing of ranks. Shape legend: N parts, T tokens,
H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.triton.launch import EXACT, INTERPRETED, kernel, power_of_two

BLOCK = 1024
"""Numbers of a program: 8 for each of 128 threads, one access of 16 bytes in bfloat16."""


@kernel
def _add_parts(
    parts: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    stored = out.dtype.element_ty
    total = tl.load(parts + at, mask=valid, other=0.0)
    for part in tl.static_range(1, PARTS):
        added = tl.load(parts + part * size + at, mask=valid, other=0.0)
        total = (total.to(tl.float32) + added.to(tl.float32)).to(stored)
    tl.store(out + at, total, mask=valid)


def add_parts(parts_NTH: Tensor) -> Tensor:
    """See `Ops.add_parts`."""
    parts_NTH = parts_NTH.contiguous()
    out_TH = torch.empty_like(parts_NTH[0])
    size = out_TH.numel()
    if size:
        block = power_of_two(size) if INTERPRETED else BLOCK
        _add_parts[(-(-size // block),)](
            parts_NTH, out_TH, size, PARTS=len(parts_NTH), BLOCK=block, **EXACT
        )
    return out_TH

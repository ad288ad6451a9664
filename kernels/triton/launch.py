"""Shared by all Triton kernels: the decorator, launch options, the interpreter switch.

Knows Triton's launcher; knows nothing of operations. Kernel arguments are annotated `tl.tensor`:
inside a kernel addresses, numbers and blocks of numbers all have this type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch options: the compiler does not fuse a multiplication and an addition, so that a row's bits
do not depend on the kernel that computes the row."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run as numpy on the CPU. Triton reads the switch when it decorates a kernel: a process
has either mode, not both."""

TL_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


COUNTS = (
    "most_polls",
    "num_lanes",
    "num_pairs",
    "num_rows",
    "num_sequences",
    "num_steps",
    "num_tokens",
    "part_steps",
    "step",
    "table_stride",
)
"""Arguments that change from step to step. Triton would compile a kernel anew for a value of 1 and
for multiples of 16, while requests wait; these values decide no load's width."""


def kernel(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """`triton.jit`, as a typed decorator; one binary serves all values of `COUNTS`."""
    return triton.jit(function, do_not_specialize=COUNTS)


def dot_type(dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Dtype of a matrix product's inputs for weights stored as `dtype`.

    One-byte formats are exact in bfloat16. The interpreter multiplies bfloat16 wrongly (as if the
    bits were integers); it gets float32 instead, and float32 represents every bfloat16.
    """
    if dtype.itemsize == 1:
        dtype = torch.bfloat16
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float32
    return TL_TYPES[dtype]


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size`, and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def rows_per_program(columns: int) -> int:
    """Rows of a program: 1; many in the interpreter, where a program costs a millisecond."""
    return max(1, (1 << 16) // columns) if INTERPRETED else 1


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

"""What every Triton kernel here shares: the decorator, launch options, whether it is interpreted.

Knows Triton's launcher; refuses to know any operation. Kernel arguments are annotated `tl.tensor`:
inside a kernel addresses, numbers and blocks of them are all that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Launch options: no product and sum become one operation, so that a row's bits do not depend on
which kernel computed it."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run as numpy on CPU. Settled when Triton decorates them, so once a process."""

TL_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def kernel(function: Callable[..., Any]) -> Any:  # noqa: ANN401
    """`triton.jit`, as a typed decorator."""
    return triton.jit(function)


def dot_type(dtype: torch.dtype) -> Any:  # noqa: ANN401
    """What a product's inputs are converted to, given what is stored.

    One-byte formats are exact in bfloat16. The interpreter multiplies bfloat16 wrongly (it takes
    its bits for integers), so there float32 stands in, which holds every bfloat16.
    """
    if dtype.itemsize == 1:
        dtype = torch.bfloat16
    if INTERPRETED and dtype == torch.bfloat16:
        dtype = torch.float32
    return TL_TYPES[dtype]


def power_of_two(size: int, least: int = 1) -> int:
    """The lowest power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def rows_a_program(columns: int) -> int:
    """Rows that one program takes: one, but many where each program costs a millisecond."""
    return max(1, (1 << 16) // columns) if INTERPRETED else 1


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

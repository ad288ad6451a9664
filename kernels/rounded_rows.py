"""Rows of a product's inputs in float8, written by the kernel that makes the rows.

A norm or an activation whose output goes into a product with rounded inputs can write the float8
rows and their scales itself, in place of a launch between the two. The bits are those of
`input_transform.float8_rows`. Knows tensors; knows nothing of kernels.

Shape legend: T rows, I columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from arriero.kernels.packed_weights import Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """How rows are rounded for the product that reads them.

    Attributes:
        bound: each row has a scale of at most bound / 448; inf for no bound. Without effect where
            `scale` is given.
        scale: float32 [1], the scale of all rows; None for a scale of each row.
        keeps_rows: others read the unrounded rows, so that both forms are written.
    """

    bound: float = math.inf
    scale: Tensor | None = None
    keeps_rows: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundedRows:
    """Rows in float8: a row is close to its levels times its scale.

    Attributes:
        levels_TI: float8_e4m3fn.
        scale_T1: float32.
        dtype: dtype of the unrounded rows, and of a product's result.
        rows_TI: the unrounded rows, where `Rounding.keeps_rows` asks for them; else None.
    """

    levels_TI: Tensor
    scale_T1: Tensor
    dtype: torch.dtype
    rows_TI: Tensor | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether the rows are on a CUDA device."""
        return self.levels_TI.is_cuda


InputRows = Tensor | RoundedRows
"""Inputs of a product, rounded already or not."""


def rounding_of(w: Linear, *, keeps_rows: bool = False) -> Rounding | None:
    """The rounding of a product's inputs where the kernel before can do it; else None.

    Args:
        w: weights of the product. Inputs in another order, and levels of other types than float8,
            are left to the product.
        keeps_rows: see `Rounding`.
    """
    inputs = w.inputs
    if inputs is None or not inputs.float8 or inputs.order_I is not None:
        return None
    if inputs.scale is not None:
        return Rounding(scale=inputs.scale, keeps_rows=keeps_rows)
    assert inputs.bound is not None, "inputs that are rounded have a scale or a bound"
    return Rounding(bound=inputs.bound, keeps_rows=keeps_rows)


def unrounded(rows: InputRows) -> Tensor:
    """The rows as the kernel made them; they must have been kept."""
    if isinstance(rows, Tensor):
        return rows
    assert rows.rows_TI is not None, "`Rounding.keeps_rows` is for rows with further readers"
    return rows.rows_TI

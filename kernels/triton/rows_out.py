"""Memory for the rows that a kernel makes: as numbers, rounded to float8, or both.

Knows what the launch of such a kernel passes on; knows nothing of how rows are computed.

Shape legend: T rows, I columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arriero.kernels.rounded_rows import InputRows, RoundedRows, Rounding


@dataclass(frozen=True, kw_only=True, slots=True)
class RowsOut:
    """Outputs of a kernel that makes whole rows.

    Attributes:
        dtype: dtype of the unrounded rows.
        rounding: how the rows are rounded; None for unrounded rows alone.
        rows_TI: the unrounded rows; None where nobody reads them.
        levels_TI: uint8 with the bits of float8; None without rounding.
        scale_T1: float32; None without rounding.
    """

    dtype: torch.dtype
    rounding: Rounding | None
    rows_TI: Tensor | None
    levels_TI: Tensor | None
    scale_T1: Tensor | None

    @property
    def result(self) -> InputRows:
        """The rows, after the launch."""
        if self.levels_TI is None:
            assert self.rows_TI is not None, "rows without rounding are kept"
            return self.rows_TI
        assert self.scale_T1 is not None, "levels have scales"
        return RoundedRows(
            levels_TI=self.levels_TI.view(torch.float8_e4m3fn),
            scale_T1=self.scale_T1,
            dtype=self.dtype,
            rows_TI=self.rows_TI,
        )

    @property
    def rounding_arguments(self) -> dict[str, Any]:
        """Arguments of `float8.store_rounded`, by name."""
        rounding = self.rounding or Rounding()
        return {
            "levels": self.levels_TI,
            "scales": self.scale_T1,
            "static_scale": rounding.scale,
            "bound": rounding.bound,
            "STATIC": rounding.scale is not None,
            "BOUNDED": math.isfinite(rounding.bound),
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """`rounding_arguments`, and those of a kernel that writes either form or both."""
        return self.rounding_arguments | {
            "out": self.rows_TI,
            "KEEPS": self.rows_TI is not None,
            "ROUNDS": self.rounding is not None,
            "TOGETHER": 16 // self.dtype.itemsize,
        }


def rows_out(num_rows: int, size: int, like: Tensor, rounding: Rounding | None = None) -> RowsOut:
    """Memory for [num_rows, size], with the dtype and the device of `like`."""

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(num_rows, columns, dtype=dtype, device=like.device)

    keeps = rounding is None or rounding.keeps_rows
    return RowsOut(
        dtype=like.dtype,
        rounding=rounding,
        rows_TI=empty(size, like.dtype) if keeps else None,
        levels_TI=None if rounding is None else empty(size, torch.uint8),
        scale_T1=None if rounding is None else empty(1, torch.float32),
    )

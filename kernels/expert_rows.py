"""Rows as the bytes that travel between ranks, and back.

Knows the formats; knows nothing of ranks, experts and transports.

Shape legend: X rows, H hidden size, B bytes of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from arriero.kernels.quantized_weight import FP8_MAX

RowFormat = Literal["float32", "bfloat16", "fp8"]
"""Format of a sent row; fp8: e4m3 levels, followed by the row's float32 scale, little-endian."""

MIN_AMAX = 1e-12
"""Smallest greatest magnitude for the scale of a row, which keeps the scale of zeros above 0."""
SCALE_BYTES = 4


def row_bytes(hidden: int, format: RowFormat) -> int:
    """Bytes of a row of `hidden` numbers."""
    if format == "fp8":
        return hidden + SCALE_BYTES
    return hidden * (4 if format == "float32" else 2)


def check(rows_XB: Tensor, hidden: int, format: RowFormat) -> None:
    """Raise `ValueError` unless the bytes are rows of `hidden` numbers."""
    expected = row_bytes(hidden, format)
    if rows_XB.ndim != 2 or rows_XB.shape[1] != expected:
        raise ValueError(
            f"rows of shape {tuple(rows_XB.shape)}: {hidden} numbers in {format} are "
            f"{expected} bytes"
        )


def pack(rows_XH: Tensor, format: RowFormat) -> Tensor:
    """Rows as bytes, uint8 [X, B]; numbers are rounded to the format, half to even."""
    if format == "fp8":
        rows_XH = rows_XH.float()
        amax_X1 = rows_XH.abs().amax(dim=-1, keepdim=True)
        scale_X1 = amax_X1.clamp_(min=MIN_AMAX) / FP8_MAX
        levels = (rows_XH / scale_X1).to(torch.float8_e4m3fn).view(torch.uint8)
        scale_X4 = scale_X1.flatten().view(torch.uint8).view(-1, SCALE_BYTES)
        return torch.cat((levels, scale_X4), dim=1)
    return rows_XH.to(getattr(torch, format)).contiguous().view(torch.uint8)


def unpack(rows_XB: Tensor, format: RowFormat, dtype: torch.dtype) -> Tensor:
    """Undo `pack`: [X, H], of `dtype`."""
    if format == "fp8":
        levels = rows_XB[:, :-SCALE_BYTES].contiguous().view(torch.float8_e4m3fn)
        # A copy even of a contiguous row: a view as float32 must be aligned.
        scale_X4 = rows_XB[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        return (levels.float() * scale_X4.view(torch.float32)).to(dtype)
    return rows_XB.view(getattr(torch, format)).to(dtype)

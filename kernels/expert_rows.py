"""Rows as the bytes that travel between ranks, and back.

Knows the formats; refuses to know ranks, experts and how bytes are sent.

Shape legend: X rows sent, Y rows taken out, H hidden size, B bytes of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from arriero.kernels.quant import FP8_MAX

Wire = Literal["float32", "bfloat16", "fp8"]
"""fp8: e4m3 levels, after them the row's float32 scale, little-endian."""

LEAST_AMAX = 1e-12
"""A row of zeros is scaled as if this were its greatest magnitude."""
SCALE_BYTES = 4


def row_bytes(hidden: int, wire: Wire) -> int:
    """Bytes of a row of `hidden` numbers."""
    if wire == "fp8":
        return hidden + SCALE_BYTES
    return hidden * (4 if wire == "float32" else 2)


def check(rows_XB: Tensor, hidden: int, wire: Wire) -> None:
    """Raise `ValueError` for bytes that are no rows of `hidden` numbers."""
    want = row_bytes(hidden, wire)
    if rows_XB.ndim != 2 or rows_XB.shape[1] != want:
        raise ValueError(
            f"rows of shape {tuple(rows_XB.shape)}: {hidden} numbers in {wire} are {want} bytes"
        )


def pack(rows_XH: Tensor, wire: Wire) -> Tensor:
    """Rows as bytes, uint8 [X, B]: rounded to the wire's numbers, half to even."""
    if wire == "fp8":
        rows_XH = rows_XH.float()
        amax_X1 = rows_XH.abs().amax(dim=-1, keepdim=True)
        scale_X1 = amax_X1.clamp_(min=LEAST_AMAX) / FP8_MAX
        levels = (rows_XH / scale_X1).to(torch.float8_e4m3fn).view(torch.uint8)
        scale_X4 = scale_X1.flatten().view(torch.uint8).view(-1, SCALE_BYTES)
        return torch.cat((levels, scale_X4), dim=1)
    return rows_XH.to(getattr(torch, wire)).contiguous().view(torch.uint8)


def unpack(rows_XB: Tensor, wire: Wire, dtype: torch.dtype) -> Tensor:
    """Undo `pack`: [X, H], of `dtype`."""
    if wire == "fp8":
        levels = rows_XB[:, :-SCALE_BYTES].contiguous().view(torch.float8_e4m3fn)
        # copied even where one row is contiguous: a view as float32 must be aligned
        scale_X4 = rows_XB[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        return (levels.float() * scale_X4.view(torch.float32)).to(dtype)
    return rows_XB.view(getattr(torch, wire)).to(dtype)

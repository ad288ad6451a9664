"""Rows of NVFP4: e2m1 numbers, two in a byte, and a float8 scale for each group of 16 columns.

As torch's block-scaled product reads them: scales lie in tiles of 128 rows and 4 groups, so that a
tensor core loads those of a tile at once. Knows numbers; knows nothing of weights.

Shape legend: T rows, I columns, G groups of 16 columns, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import triton.language as tl
from arriero.kernels.input_levels import FP4_GROUP
from arriero.kernels.quantized_weight import FP4_MAX, FP8_MAX
from arriero.kernels.triton.float8 import fp8_bits, fp8_value
from arriero.kernels.triton.launch import (
    EXACT,
    kernel,
    power_of_two,
    rows_per_program,
    unit_stride,
)

TILE_ROWS, TILE_GROUPS = 128, 4
"""Rows and groups of a tile of scales; both sizes of the scales are padded to whole tiles."""
COLUMN_UNIT = 32
"""Rows are padded with zeros to a multiple of this number of columns: 16 bytes."""
BLOCK = 4096
"""Columns of a program: a group for each thread."""

_GROUP = tl.constexpr(FP4_GROUP)
_FP4_MAX = tl.constexpr(FP4_MAX)
_FP8_MAX = tl.constexpr(FP8_MAX)
_NAN = tl.constexpr(0x7F)
_SIX = tl.constexpr(0x40C00000)
_ONE = tl.constexpr(0x3F800000)
_BIAS = tl.constexpr(126 << 1)
"""Difference between the exponents of float32 and e2m1, above a bit of fraction."""
_TILE_ROWS = tl.constexpr(TILE_ROWS)
_TILE_GROUPS = tl.constexpr(TILE_GROUPS)
_STRIPE = tl.constexpr(TILE_ROWS // 4)
"""Rows of a tile whose scales are 16 bytes apart; the four stripes lie between."""


@dataclass(frozen=True, slots=True)
class Fp4Rows:
    """A matrix as torch's block-scaled product takes it.

    Attributes:
        codes_TB: float4_e2m1fn_x2 [T, B], an even column in the low half of a byte; columns are
            padded with zeros to a multiple of 32.
        scales: float8_e4m3fn, one dimension: tiles of 128 rows and 4 groups, row of tiles by row.
            Row r and group g of a tile have byte r % 32 * 16 + r // 32 * 4 + g. Padding is 0.
    """

    codes_TB: Tensor
    scales: Tensor


@kernel
def fp4_code(value: tl.tensor) -> tl.tensor:
    """E2m1 codes of float32 numbers: the nearest, ties to the even code, at most magnitude 6."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, _SIX)
    normal = ((magnitude + 0x1FFFFF + ((magnitude >> 22) & 1)) >> 22) - _BIAS
    # Below 1 numbers are 0.5 apart: 2**23 plus the number of halves has it in the last bits.
    count = magnitude.to(tl.float32, bitcast=True) * 2.0 + 8388608.0
    small = count.to(tl.int32, bitcast=True) & 3
    return ((bits >> 28) & 8) | tl.where(magnitude < _ONE, small, normal)


@kernel
def _fp4_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    input_scale: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    row_bytes: tl.tensor,
    x_stride: tl.tensor,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    column = group[:, :, None] * _GROUP + tl.arange(0, _GROUP)[None, None, :]
    valid = (row < num_rows)[:, :, None] & (column < size)
    from_row = x + row.to(tl.int64)[:, :, None] * x_stride
    value = tl.load(from_row + column, mask=valid, other=0.0).to(tl.float32)
    whole = tl.full([ROWS, GROUPS, _GROUP], 0.0, tl.float32) + tl.load(input_scale)
    value = tl.div_rn(value, whole)
    greatest = tl.max(tl.abs(value), 2)
    scale = tl.div_rn(greatest, tl.full([ROWS, GROUPS], _FP4_MAX, tl.float32))
    byte = fp8_bits(tl.minimum(scale, _FP8_MAX))
    # the maximum may drop a NaN, which e2m1 lacks: the scale of the group carries it
    byte = tl.where(tl.max((value != value).to(tl.int32), 2) != 0, _NAN, byte)
    unit = fp8_value(byte)
    unit = tl.where(unit == 0, 1.0, unit)
    level = tl.div_rn(value, tl.broadcast_to(unit[:, :, None], [ROWS, GROUPS, _GROUP]))
    pairs = tl.reshape(fp4_code(level), [ROWS, GROUPS, _GROUP // 2, 2])
    low, high = tl.split(pairs)
    at = group[:, :, None] * (_GROUP // 2) + tl.arange(0, _GROUP // 2)[None, None, :]
    to_row = codes + row.to(tl.int64)[:, :, None] * row_bytes
    stored = (row < num_rows)[:, :, None] & (at < row_bytes)
    tl.store(to_row + at, (low | (high << 4)).to(tl.uint8), mask=stored)
    # scales of rows and groups of the padding are 0, whatever memory had there
    num_tiles = tl.cdiv(tl.cdiv(size, _GROUP), _TILE_GROUPS)
    tile = row // _TILE_ROWS * num_tiles + group // _TILE_GROUPS
    within = row % _STRIPE * 16 + row % _TILE_ROWS // _STRIPE * 4 + group % _TILE_GROUPS
    to_scale = scales + tile.to(tl.int64) * (_TILE_ROWS * _TILE_GROUPS) + within
    tl.store(to_scale, byte.to(tl.uint8), mask=group < num_tiles * _TILE_GROUPS)


def fp4_rows(x_TI: Tensor, scale: Tensor) -> Fp4Rows:
    """Round rows to NVFP4 with a static scale, in one launch; see `input_levels.fp4_groups`.

    Args:
        x_TI: inputs of any float dtype.
        scale: float32 [1], on the device: the scale of all inputs.
    """
    x_TI = unit_stride(x_TI)
    num_rows, size = x_TI.shape
    row_bytes = padded_columns(size) // 2
    codes_TB = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=x_TI.device)
    padded_rows = -(-num_rows // TILE_ROWS) * TILE_ROWS
    groups = -(-size // (FP4_GROUP * TILE_GROUPS)) * TILE_GROUPS
    scales = torch.empty(padded_rows * groups, dtype=torch.uint8, device=x_TI.device)
    block = min(BLOCK, power_of_two(groups * FP4_GROUP))
    rows = min(TILE_ROWS, power_of_two(rows_per_program(block)))
    if num_rows:
        _fp4_rows[(padded_rows // rows, -(-groups * FP4_GROUP // block))](
            x_TI,
            codes_TB,
            scales,
            scale,
            num_rows,
            size,
            row_bytes,
            x_TI.stride(0),
            ROWS=rows,
            GROUPS=block // FP4_GROUP,
            num_warps=8,
            **EXACT,
        )
    return Fp4Rows(codes_TB.view(torch.float4_e2m1fn_x2), scales.view(torch.float8_e4m3fn))


def padded_columns(size: int) -> int:
    """Columns of a row with its padding."""
    return -(-size // COLUMN_UNIT) * COLUMN_UNIT


def tiled_scales(scales_TG: Tensor) -> Tensor:
    """Scales float8_e4m3fn [T, G] in the order of `Fp4Rows.scales`."""
    rows, groups = scales_TG.shape
    bytes_TG = F.pad(scales_TG.view(torch.uint8), (0, -groups % TILE_GROUPS, 0, -rows % TILE_ROWS))
    tiles = bytes_TG.view(-1, 4, TILE_ROWS // 4, bytes_TG.shape[1] // TILE_GROUPS, TILE_GROUPS)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e4m3fn)

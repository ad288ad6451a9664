"""Rows of keys and values in a byte a number, for tiers that hold blocks in less than the device.

A row, one head's key or value of a token, is its numbers and behind them their float32 scale. In
int8 they are 127 levels of either sign, as `KVCacheSpec` has it for caches in int8; in fp8 they are
float8 e4m3 (Micikevicius et al. 2022, FP8 Formats for Deep Learning), whose greatest, 448, is the
row's own greatest. int8 is nearer where a row's numbers are of one size, fp8 where a few outgrow
the others. Packing again what was unpacked changes it by rounding alone, so a block does not fade
as it goes up and down.

Knows numbers; knows nothing of blocks or tiers.

Shape legend: D head dimension; a packed row has D + 4 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.kernels.reference.kv import int8_levels
from arriero.shards.config.kv_tiers import SCALE_BYTES, RowType

_FP8 = torch.float8_e4m3fn
_FP8_MOST = torch.finfo(_FP8).max


def pack(data: Tensor, dtype: RowType) -> Tensor:
    """Rows in a byte a number, on the same device.

    Args:
        data: [..., D] of any float.
        dtype: of the numbers.

    Returns:
        int8 [..., D + 4]; fp8's bits too.
    """
    if dtype == "int8":
        levels, scale = int8_levels(data)
        held = levels.to(torch.int8)
    else:
        rows = data.float()
        scale = rows.abs().amax(-1) / _FP8_MOST
        held = (rows / scale.where(scale > 0, 1.0)[..., None]).to(_FP8).view(torch.int8)
    return torch.cat([held, scale[..., None].view(torch.int8)], dim=-1)


def unpack(packed: Tensor, dtype: RowType) -> Tensor:
    """Undo `pack`, to rounding.

    Args:
        packed: int8 [..., D + 4].
        dtype: of the numbers.

    Returns:
        float32 [..., D].
    """
    held, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    numbers = held if dtype == "int8" else held.view(_FP8)
    return numbers.float() * scale.contiguous().view(torch.float32)

"""Rows of keys and values at one byte a number, for tiers with smaller blocks than the device.

A row, one head's key or value of a token, is its numbers followed by their float32 scale. In int8
the numbers are 127 levels of either sign, as `KVCacheSpec` has it for caches in int8; in fp8 they
are float8 e4m3 (Micikevicius et al. 2022, FP8 Formats for Deep Learning), whose maximum, 448, is
the row's own maximum. int8 is more exact for rows with numbers of similar size, fp8 for rows with a
few large numbers. Packing a row that was unpacked changes it by rounding alone, so a block does not
degrade over many transfers.

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
    """Pack rows at one byte a number, on the same device.

    Args:
        data: [..., D] of any float.
        dtype: type of the packed numbers.

    Returns:
        int8 [..., D + 4]; for fp8 the bits of the numbers.
    """
    if dtype == "int8":
        levels, scale = int8_levels(data)
        packed_numbers = levels.to(torch.int8)
    else:
        rows = data.float()
        scale = rows.abs().amax(-1) / _FP8_MOST
        packed_numbers = (rows / scale.where(scale > 0, 1.0)[..., None]).to(_FP8).view(torch.int8)
    return torch.cat([packed_numbers, scale[..., None].view(torch.int8)], dim=-1)


def unpack(packed: Tensor, dtype: RowType) -> Tensor:
    """Undo `pack`, to rounding.

    Args:
        packed: int8 [..., D + 4].
        dtype: type of the packed numbers.

    Returns:
        float32 [..., D].
    """
    packed_numbers, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    numbers = packed_numbers if dtype == "int8" else packed_numbers.view(_FP8)
    return numbers.float() * scale.contiguous().view(torch.float32)

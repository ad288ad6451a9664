"""Rows of keys and values at one byte a number, for tiers with smaller blocks than the device.

A row, one head's key or value of a token, is its numbers followed by their float32 scale. In int8
the numbers are 127 levels of either sign, as `KVCacheSpec` has it for caches in int8; in fp8 they
are float8 e4m3 (Micikevicius et al. 2022, FP8 Formats for Deep Learning) whose maximum, 448, is the
row's own maximum, as in `kernels.expert_rows`. int8 is more exact for rows with numbers of similar
size, fp8 for rows with a few large numbers. Packing a row that was unpacked changes it by rounding
alone, so a block does not degrade over many transfers.

Knows numbers; knows nothing of blocks or tiers.

Shape legend: D head dimension; a packed row has D + 4 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.kernels import expert_rows
from arriero.kernels.reference.kv import int8_levels
from arriero.shards.config.kv_tiers import SCALE_BYTES, RowType


def pack(data: Tensor, dtype: RowType) -> Tensor:
    """Pack rows at one byte a number, on the same device.

    Args:
        data: [..., D] of any float.
        dtype: type of the packed numbers.

    Returns:
        int8 [..., D + 4]; for fp8 the bits of the numbers.
    """
    if dtype == "fp8":
        return expert_rows.pack(data, "fp8").view(torch.int8)
    levels, scale = int8_levels(data)
    return torch.cat([levels.to(torch.int8), scale[..., None].view(torch.int8)], dim=-1)


def unpack(packed: Tensor, dtype: RowType) -> Tensor:
    """Undo `pack`, to rounding.

    Args:
        packed: int8 [..., D + 4].
        dtype: type of the packed numbers.

    Returns:
        float32 [..., D].
    """
    if dtype == "fp8":
        return expert_rows.unpack(packed.view(torch.uint8), "fp8", torch.float32)
    levels, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    return levels.float() * scale.contiguous().view(torch.float32)

"""Rows of keys and values in int8, for tiers that hold blocks in less than the device does.

A row, one head's key or value of a token, is 127 levels of either sign and behind them their
float32 scale, as `KVCacheSpec` has it for caches in int8. Packing again what was unpacked changes
it by rounding alone, so a block does not fade as it goes up and down.

Knows numbers; knows nothing of blocks or tiers.

Shape legend: D head dimension; a packed row has D + 4 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.kernels.reference.kv import int8_levels
from arriero.shards.kv.config import SCALE_BYTES


def pack(data: Tensor) -> Tensor:
    """Rows in int8, on the same device.

    Args:
        data: [..., D] of any float.

    Returns:
        int8 [..., D + 4].
    """
    levels, scale = int8_levels(data)
    return torch.cat([levels.to(torch.int8), scale[..., None].view(torch.int8)], dim=-1)


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`, to rounding.

    Args:
        packed: int8 [..., D + 4].

    Returns:
        float32 [..., D].
    """
    levels, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
    return levels.float() * scale.contiguous().view(torch.float32)

"""Checksums of blocks in memory: every reader can check that the bytes are those written.

One checksum for each layer, keys or values, and KV head of a block, so that a reader of a part of a
block can check just that part. The checksums are in the slot's stamp from the write on, and travel
with the bytes on every way. A change within one word is always detected, whatever its bits. Changes
of several words are missed only if they cancel in the sum. The sums run at the rate of memory,
CRC-32 (used in files) at a third of that rate.

Knows numbers; knows nothing of slots.
Shape legend: L layers, K KV heads, P positions of a block, D head dimension (canonical).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SUM_BYTES = 8
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def block_sums(data: Tensor) -> Tensor:
    """Sums of blocks: all words of a head's keys or values, modulo 2⁶⁴.

    Args:
        data: [..., L, 2 (k, v), K, P, D] of any type.

    Returns:
        int64 [..., L, 2, K].
    """
    flat = data.flatten(-2)
    words = flat.view(_WORDS[math.gcd(flat.shape[-1] * flat.itemsize, 8)])
    return words.sum(-1, dtype=torch.int64)

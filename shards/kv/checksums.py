"""Checksums of blocks in memory: what was written there is what is used, whoever reads it.

One for each layer, keys or values, and KV head of a block, so that a reader who wants a part of it
can check just that; they lie in the slot's stamp from the write on, and go with the bytes by
whatever way. A changed word always shows, however many of its bits; of more words in one sum, all
but changes that add up to nothing. They run at memory's own rate, CRC-32 (of the files) at a third
of it.

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
    """Sums of blocks: of a head's keys or values all words, modulo 2⁶⁴.

    Args:
        data: [..., L, 2 (k, v), K, P, D] of any type.

    Returns:
        int64 [..., L, 2, K].
    """
    flat = data.flatten(-2)
    words = flat.view(_WORDS[math.gcd(flat.shape[-1] * flat.itemsize, 8)])
    return words.sum(-1, dtype=torch.int64)

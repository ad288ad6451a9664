"""Checksums of blocks in memory: what was written there is what is used, whoever reads it.

One for each layer and KV head of a block, so that a reader who wants a part of it can check that
part: its sums lie in the slot's stamp from the write on and go with the bytes, by whatever way.
A changed word always shows, however many bits of it; of two, all but those where one row of words
takes away the very number that it adds. Additions alone run at memory's own rate; CRC-32 (of the
files) has a third of it.

Knows numbers; knows nothing of slots.

Shape legend: L layers, K KV heads, P positions of a block, D head dimension (canonical).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

SUM_BYTES = 8
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_MOST_ROWS = 4
_ODD = 0x9E3779B97F4A7C15


def block_sums(data: Tensor) -> Tensor:
    """Sums of blocks.

    Words of a head's keys are added up in rows, modulo 2⁶⁴, and so are those of its values; a
    row's sum is multiplied by an odd number of its own, and all are added up.

    Args:
        data: [..., L, 2 (k, v), K, P, D] of any type.

    Returns:
        int64 [..., L, K].
    """
    flat = data.flatten(-2)
    nbytes = flat.shape[-1] * flat.itemsize
    words = flat.view(_WORDS[math.gcd(nbytes, 8)])
    rows = math.gcd(words.shape[-1], _MOST_ROWS)
    added = words.reshape(*words.shape[:-1], rows, -1).sum(-1, dtype=torch.int64)
    total: Tensor = (added * _weights(rows)).sum((-3, -1))
    return total


@functools.cache
def _weights(rows: int) -> Tensor:
    odd = [(2 * i + 1) * _ODD % (1 << 64) for i in range(2 * rows)]
    signed = [one - (1 << 64) if one >> 63 else one for one in odd]
    return torch.tensor(signed, dtype=torch.int64).reshape(2, 1, rows)

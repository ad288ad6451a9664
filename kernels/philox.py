"""Philox-4x32-10, the counter-based generator of all random draws.

A draw is a pure function of (seed, position): the generator has no state, so that a stream that
resumes in another group gets the same numbers. `token_noise.py` makes a number for each token of
the words for a row. Knows integers; knows nothing of tokens.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Encrypt a counter: four int64 tensors of the same shape with 32-bit words.

    Args:
        counter: the words c0 .. c3, each 0 .. 2**32 - 1.
        key: the words k0, k1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of 32 x 32 bits fills 64 bits: int64 wraps, and the masks remove the sign.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32) & _MASK ^ c1 ^ k0,
            p1 & _MASK,
            (p0 >> 32) & _MASK ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def row_key(seed_R: Tensor, position_R: Tensor) -> Words:
    """Four random words of 32 bits for each (seed, position), both int64 [R].

    k0, k1 are the low and high word of the seed, c0, c1 those of the position; c2 = c3 = 0.
    """
    zero = torch.zeros_like(position_R)
    counter = (position_R & _MASK, (position_R >> 32) & _MASK, zero, zero)
    return philox_4x32(counter, (seed_R & _MASK, (seed_R >> 32) & _MASK))

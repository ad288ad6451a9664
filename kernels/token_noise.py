"""The random number of each token of a row: what makes a draw by an exponential race.

A number depends on the row's key (four words of 32 bits from `philox.row_key`) and on the token's
id alone: not on other tokens, so that a model and its draft model have the same noise for a token,
even where the draft model has fewer tokens. Philox for each token would cost more than the whole
draw, so a cheaper mix makes the words of the tokens: xor-shifts and products, as in SplitMix
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), on 32 bits,
which vector units multiply. Shifts and factors are those of `triple32` of Chris Wellons' "Hash
Prospector" (2018, public domain); a second word of the key enters between the products, since a
key of one word would give two rows in 2**16 the same noise.

Knows integers; knows nothing of logits. Shape legend: R rows, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.kernels.philox import Words

FACTORS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
SHIFTS = (17, 11, 15, 14)
_MASK = 0xFFFFFFFF


def mix(token_V: Tensor, first_R1: Tensor, second_R1: Tensor) -> Tensor:
    """A word of 32 bits for each row and token: int64 [R, V].

    Args:
        token_V: ids, int64.
        first_R1: a word of the row's key, int64.
        second_R1: another word of the row's key, int64.
    """
    x_RV = token_V ^ first_R1
    x_RV ^= x_RV >> SHIFTS[0]
    x_RV.mul_(FACTORS[0]).bitwise_and_(_MASK)
    x_RV ^= x_RV >> SHIFTS[1]
    x_RV.add_(second_R1).mul_(FACTORS[1]).bitwise_and_(_MASK)
    x_RV ^= x_RV >> SHIFTS[2]
    x_RV.mul_(FACTORS[2]).bitwise_and_(_MASK)
    x_RV ^= x_RV >> SHIFTS[3]
    return x_RV


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """(2**21 high + 2 floor(low / 2**12) + 1) * 2**-53, float64: exact, never 0 and never 1.

    Args:
        high: a word of 32 bits, int64.
        low: another word; 20 bits of it are used.
    """
    return ((high << 21) | (low >> 11) | 1).double() * 2.0**-53


def token_uniforms(key: Words, token_V: Tensor) -> Tensor:
    """The uniform number of each row and token, float64 [R, V].

    Args:
        key: `philox.row_key` of the rows, four int64 [R].
        token_V: ids of the tokens, any integer dtype.
    """
    k0, k1, k2, k3 = (word_R[:, None] for word_R in key)
    token_V = token_V.to(torch.int64)
    return uniform(mix(token_V, k0, k1), mix(token_V, k2, k3))

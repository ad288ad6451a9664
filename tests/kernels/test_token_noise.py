"""The numbers of the tokens: their bits, and that they are as good as independent.

Statistics are chi-square sums against their mean and deviation; seeds are fixed, so no run differs
from another.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from arriero.kernels.philox import row_key
from arriero.kernels.token_noise import token_uniforms, uniform

from .draws import noise

ROWS = {
    "seeds": lambda n: (torch.arange(n), torch.full((n,), 17)),
    "positions": lambda n: (torch.full((n,), 42), torch.arange(n)),
}


def noise_of(seed_R: Tensor, position_R: Tensor, token_V: Tensor) -> Tensor:
    """float64 [R, V]."""
    return token_uniforms(row_key(seed_R, position_R), token_V)


def surplus(counts: Tensor) -> float:
    """Deviations by which the chi-square of counts with equal chances exceeds its mean."""
    mean = counts.sum() / counts.numel()
    chi_square = float(((counts - mean) ** 2 / mean).sum())
    degrees = counts.numel() - 1
    return (chi_square - degrees) / math.sqrt(2 * degrees)


def histogram(cells: Tensor, num_cells: int) -> Tensor:
    return torch.bincount(cells.flatten(), minlength=num_cells).double()


def test_bits() -> None:
    seeds, positions = [0, 1, -1, 2**63 - 1, 123456789012345678], [0, 7, 99, 2**40 + 3, 131071]
    tokens = np.array([0, 1, 2, 49151, 128255, 2**18 - 1], np.int32)
    got = noise_of(torch.tensor(seeds), torch.tensor(positions), torch.from_numpy(tokens))
    assert got.tolist() == [
        noise(seed, position, tokens).tolist()
        for seed, position in zip(seeds, positions, strict=True)
    ]


def test_the_ends_are_open() -> None:
    """The least and the greatest number are exact, and their logarithms finite and not zero."""
    ends = torch.tensor([0, 2**32 - 1])
    least, greatest = uniform(ends, ends).tolist()
    assert least == 2.0**-53 and greatest == 1 - 2.0**-53
    assert math.isfinite(math.log(least)) and math.log(greatest) < 0


@pytest.mark.parametrize("rows", ROWS)
def test_each_token_is_uniform_over_the_rows(rows: str) -> None:
    """For a token alone, over many seeds and over the positions of one seed."""
    token_V = torch.tensor([0, 1, 2, 777, 128_255])
    u_RV = noise_of(*ROWS[rows](100_000), token_V)
    for u_R in u_RV.T:
        for scale in (1, 2**20):  # the leading bits, and bits 21 to 26
            cells = ((u_R * scale * 64) % 64).long()
            assert abs(surplus(histogram(cells, 64))) < 4.5


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("distance", [1, 2, 16, 255, 4096, 2**17])
def test_pairs_of_tokens_are_independent(rows: str, distance: int) -> None:
    """Neighbours and tokens at powers of two, in the cells of a grid and in the far corner."""
    count, first = 200_000, 1000
    u_R2 = noise_of(*ROWS[rows](count), torch.tensor([first, first + distance]))
    cell_R2 = (u_R2 * 16).long()
    assert abs(surplus(histogram(cell_R2[:, 0] * 16 + cell_R2[:, 1], 256))) < 4.5
    # winners have u near 1: 1 - u below 1 / 64 for both, in count / 4096 of the rows
    both = int((u_R2 > 1 - 1 / 64).all(-1).sum())
    assert abs(both - count / 4096) < 4.5 * math.sqrt(count / 4096)


def test_the_tokens_of_a_row_are_uniform_and_independent() -> None:
    """Over all tokens of single rows: by themselves, with their neighbours, and row by row."""
    u_RV = noise_of(torch.tensor([3, 3, 4]), torch.tensor([10, 11, 10]), torch.arange(2**18))
    cell_RV = (u_RV * 16).long()
    for row_V in cell_RV:
        assert abs(surplus(histogram(row_V, 16))) < 4.5
        assert abs(surplus(histogram(row_V[:-1] * 16 + row_V[1:], 256))) < 4.5
    for other in (1, 2):  # the next position, and the next seed
        assert abs(surplus(histogram(cell_RV[0] * 16 + cell_RV[other], 256))) < 4.5

"""The sum of the ranks' parts: in rank order, bit for bit, on every backend."""

from __future__ import annotations

import pytest
import torch

from arriero.kernels.ops import Ops
from arriero.shards.collectives.mesh import added


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 24), (5, 700), (0, 16)], ids=str)
def test_parts_are_added_one_after_another(
    ops: Ops, dtype: torch.dtype, parts: int, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(parts)
    x_NTH = (
        torch.randn(parts, *shape, generator=generator)
        * torch.logspace(-3, 3, parts)[:, None, None]
    )
    x_NTH = x_NTH.to(dtype)
    expected = added(x_NTH.clone())
    actual = ops.add_parts(x_NTH.clone())
    assert actual.dtype == dtype and torch.equal(actual, expected)
    if parts == 8 and shape[0] == 5:  # another order has other bits: the order is what counts
        assert not torch.equal(added(x_NTH.flip(0).clone()), expected)


def test_numbers_that_are_not_finite_stay(ops: Ops) -> None:
    x_NTH = torch.zeros(3, 1, 16)
    x_NTH[0, 0, 0], x_NTH[1, 0, 1] = torch.inf, torch.nan
    total = ops.add_parts(x_NTH)
    assert total[0, 0] == torch.inf and total[0, 1].isnan() and (total[0, 2:] == 0).all()

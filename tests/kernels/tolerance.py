"""How far a backend may be from the exact result: what rounding explains, and no more.

Two roundings exist. A product's inputs may be rounded to the weights' dtype (`ops.py` allows
it): K independent errors of at most u each on the terms x_k w_k, whose sum has a standard
deviation under u / sqrt(3) * sqrt(sum (x_k w_k)²); `SIGMAS` of those are granted. Sums run in
float32 in any order: a random walk of K steps, each at most 2**-24 of the magnitudes summed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

SIGMAS = 4.0
U32 = 2.0**-24
UNIT = {torch.float32: U32, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def product(x_TI: Array, w_OI: Array, dtype: torch.dtype) -> Array:
    """Tolerance of each element of x Wᵀ, with W as stored."""
    spread = np.sqrt((x_TI**2) @ (w_OI**2).T)
    walk = 2 * np.sqrt(x_TI.shape[1]) + 2
    tolerance: Array = SIGMAS * UNIT[dtype] * spread + walk * U32 * (np.abs(x_TI) @ np.abs(w_OI).T)
    return tolerance


def stored(value: Array, scale: Array, dtype: torch.dtype) -> Array:
    """Tolerance of a value stored in `dtype` that came from float32 sums of magnitude `scale`."""
    unit = 0.0 if dtype == torch.float32 else UNIT[dtype]
    # float16 has subnormals in reach: below 2**-14 the error is absolute.
    tiny = 2.0**-25 if dtype == torch.float16 else 0.0
    tolerance: Array = 1.01 * unit * np.abs(value) + tiny + 4 * U32 * scale
    return tolerance


def check(actual: torch.Tensor, expected: Array, tolerance: Array | float) -> None:
    """Fail where an element is further off than its own tolerance; name the worst one."""
    assert tuple(actual.shape) == expected.shape
    got = actual.detach().double().numpy()
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} elements not finite"
    excess = np.abs(got - expected) / (np.asarray(tolerance) + 1e-30)
    if excess.size:
        worst = np.unravel_index(excess.argmax(), excess.shape)
        where = tuple(int(i) for i in worst)
        assert excess.max() <= 1.0, (
            f"element {where}: {got[worst]} for {expected[worst]}, {excess.max():.3g} tolerances"
        )

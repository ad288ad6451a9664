"""Products of float8 rows with float8 weights by torch's own kernel (`torch._scaled_mm`).

The tensor cores multiply the float8 numbers themselves, and the product applies the scale of each
row and of each output: two launches, of which the other is the rounding of the inputs, and no pass
in float32. A product of the same levels in another order of sums: for the fast mode, not for
`batch_independent`. A kernel that is absent or wrong on a device is found by a product of known
result while weights load, and Triton's product serves. Knows packed weights; knows nothing of
layers.

Shape legend: T rows, O outputs, I inputs.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from arriero.kernels.triton.weights import Packed

_LOG = logging.getLogger(__name__)
_UNIT = 16
"""Sizes of float8 matrices are multiples of this, in torch's kernels."""
_SHAPE = (48, 64, 96)
"""Rows, outputs and inputs of the product that shows whether the kernel works."""
_BOUND = 0.01
"""Greatest error of that product, over its greatest number: bfloat16 rounds to 1/256."""


def takes(w: Packed) -> bool:
    """Whether the kernel takes these weights: float8 with a scale for each row."""
    outputs, inputs = w.data.shape
    return w.kind == "fp8" and outputs % _UNIT == 0 and inputs % _UNIT == 0


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the device has the kernel, and the kernel gives a known product."""
    rows, outputs, inputs = _SHAPE
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(torch.float8_e4m3fn)
    w = torch.randn(outputs, inputs, generator=generator).to(torch.float8_e4m3fn)
    scale_T1 = torch.rand(rows, 1, generator=generator) + 0.5
    scale_O1 = torch.rand(outputs, 1, generator=generator) + 0.5
    expected = (x.float() * scale_T1) @ (w.float() * scale_O1).T
    try:
        scales = scale_T1.to(device), scale_O1.to(device)
        product = _multiply(x.to(device), w.to(device), *scales, torch.bfloat16)
        actual = product.float().cpu()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        _LOG.info("float8 products by Triton: %s has no torch._scaled_mm (%s)", device, error)
        return False
    error_share = float((actual - expected).abs().max() / expected.abs().max())
    if not error_share < _BOUND:
        _LOG.warning(
            "float8 products by Triton: torch._scaled_mm on %s is off by %.3g of the greatest "
            "number, more than %.3g",
            device,
            error_share,
            _BOUND,
        )
        return False
    return True


def multiply(q_TI: Tensor, scale: Tensor, w: Packed, dtype: torch.dtype) -> Tensor:
    """Y = scale * (q Wᵀ) * the weights' scales.

    Args:
        q_TI: float8_e4m3fn [T, I].
        scale: float32 [T, 1], or [1] for all rows.
        w: weights that `takes` accepts.
        dtype: dtype of the result; bfloat16 on CUDA.

    Returns:
        [T, O] of `dtype`.
    """
    assert w.scales is not None, "float8 weights have scales"
    rows = q_TI.shape[0]
    if not rows:
        return q_TI.new_empty((0, w.out_features), dtype=dtype)
    scale_T1 = scale if scale.ndim == 2 else scale.expand(rows, 1).contiguous()
    return _multiply(q_TI, w.data, scale_T1, w.scales, dtype)


def _multiply(
    q_TI: Tensor, w_OI: Tensor, scale_T1: Tensor, scale_O1: Tensor, dtype: torch.dtype
) -> Tensor:
    y_TO: Tensor = torch._scaled_mm(
        q_TI, w_OI.t(), scale_a=scale_T1, scale_b=scale_O1.t(), out_dtype=dtype
    )
    return y_TO

"""Rounding of inputs to int8, float8 and e2m1, as formats with rounded inputs define it.

Knows numbers; knows nothing of products, backends and checkpoint formats.

Shape legend: T rows, I columns (inputs), G groups of C columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.quantized_weight import FP4_MAX, FP8_MAX, nonzero

FP4_GROUP = 16
"""Columns of e2m1 inputs that share a scale."""
LEVEL_GROUP = 32
"""Columns of int8 inputs that share a scale; see `int8_groups`."""
_INT8_MAX = 127
_LEAST_MAGNITUDE = 1e-30
"""A group of inputs with a lower greatest magnitude becomes zeros."""


def static_levels(x_TI: Tensor, scale: Tensor, levels: str) -> Tensor:
    """Levels q float32 [T, I] with x close to q * scale; larger magnitudes get the last level.

    Args:
        x_TI: inputs of any float dtype.
        scale: float32 [1], or [T, 1]: a scale for each row.
        levels: int8: integers -128 .. 127. fp8: float8_e4m3fn numbers. fp4: e2m1 numbers times the
            float8 scale of their group of 16 columns, see `fp4_levels`.
    """
    if levels == "fp8":
        return static_float8(x_TI, scale).float()
    x_TI = x_TI.float() / scale
    if levels == "fp4":
        return fp4_levels(x_TI)
    return x_TI.round_().clamp_(-128, 127)


def static_float8(x_TI: Tensor, scale: Tensor) -> Tensor:
    """As `static_levels` for fp8, in float8_e4m3fn."""
    return (x_TI.float() / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def int8_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8 with a scale for each row: dynamic token scales, computed as in vLLM.

    The scale is the greatest magnitude / 127, and 1 for a row of zeros. compressed-tensors divides
    by 127.5 when it calibrates; then the greatest number lies between two levels, and the last bit
    of a sum would choose the level.

    Returns:
        Levels -127 .. 127 as float32 [T, I], scale float32 [T, 1].
    """
    x_TI = x_TI.float()
    scale_T1 = nonzero(x_TI.abs().amax(1, keepdim=True) / _INT8_MAX)
    return (x_TI / scale_T1).round_().clamp_(-_INT8_MAX, _INT8_MAX), scale_T1


def int8_groups(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Round each group of 32 columns to int8 with a scale of its own.

    The scale is the greatest magnitude / 127, a level the nearest whole number to
    x * (127 / greatest magnitude), all in float32. A group below 1e-30 becomes zeros.

    Args:
        x_TI: inputs of any float dtype; I is a multiple of 32.

    Returns:
        Levels -127 .. 127 as float32 [T, I], scales float32 [T, I / 32].
    """
    x_TGC = x_TI.float().view(len(x_TI), -1, LEVEL_GROUP)
    greatest_TG1 = x_TGC.abs().amax(2, keepdim=True)
    inverse_TG1 = (_INT8_MAX / greatest_TG1).where(greatest_TG1 >= _LEAST_MAGNITUDE, 0.0)
    scale_TG1 = (greatest_TG1 / _INT8_MAX).where(greatest_TG1 >= _LEAST_MAGNITUDE, 0.0)
    return (x_TGC * inverse_TG1).round_().flatten(1), scale_TG1[..., 0]


def fp4_levels(x_TI: Tensor) -> Tensor:
    """Round to NVFP4: e2m1 numbers times a float8_e4m3fn scale for each group of 16 columns.

    Args:
        x_TI: float32 inputs, already divided by the scale of the whole tensor.

    Returns:
        Float32 [T, I]; each product of a number and a scale is exact in bfloat16.
    """
    number_TGC, scale_TG = fp4_groups(x_TI)
    return (number_TGC * scale_TG[..., None]).flatten(1)[:, : x_TI.shape[1]]


def fp4_groups(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers and the scales of `fp4_levels`; columns past the last are zeros.

    The scale of a group is its greatest magnitude / 6, rounded to float8 (at most 448). A group
    whose scale rounds to 0 becomes zeros.

    Returns:
        E2m1 numbers float32 [T, G, 16], scales float32 [T, G].
    """
    x_TGC = F.pad(x_TI, (0, -x_TI.shape[1] % FP4_GROUP)).view(len(x_TI), -1, FP4_GROUP)
    scale_TG1 = (x_TGC.abs().amax(2, keepdim=True) / FP4_MAX).clamp_(max=FP8_MAX)
    scale_TG1 = scale_TG1.to(torch.float8_e4m3fn).float()
    return _to_fp4(x_TGC / nonzero(scale_TG1)), scale_TG1[..., 0]


def _to_fp4(x: Tensor) -> Tensor:
    """The nearest e2m1 numbers, ties to the even code; magnitudes above 6 become 6."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp_(max=FP4_MAX).copysign(x)

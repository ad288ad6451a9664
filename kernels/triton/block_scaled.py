"""Products of NVFP4 rows with NVFP4 weights by torch's own kernel (`F.scaled_mm`).

The tensor cores of compute capability 10.0 multiply e2m1 numbers and apply the float8 scales of
both sides themselves: a launch rounds the inputs, and the product reads four bits and a half for
each weight. Only where the checkpoint rounds the inputs (W4A4): weights alone keep Triton's
product. Another order of sums, so for the fast mode, not for `batch_independent`. A kernel that is
absent or wrong on a device is found by products of known result while weights load, and Triton's
product serves. Has not run on a GPU yet. Knows matrices; knows nothing of layers.

Shape legend: T rows, O outputs, I inputs, B bytes of a row.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.input_levels import FP4_GROUP
from arriero.kernels.quantized_weight import QuantizedWeight, stack
from arriero.kernels.triton.float4 import Fp4Rows, fp4_rows, padded_columns, tiled_scales
from arriero.kernels.triton.upload import Upload

_LOG = logging.getLogger(__name__)
CAPABILITY = (10, 0)
"""Least compute capability with matrix instructions for e2m1 numbers."""
_UNIT = 16
"""Outputs are a multiple of this, in torch's kernels."""
_SHAPE = (33, 144, 96)
"""Rows, outputs and inputs of the products that show whether the kernel works: part of a tile of
scales, and more than a tile."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of a model's activations."""
_BOUND = 0.01
"""Greatest error of these products, over their greatest number: bfloat16 rounds to 1/256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockScaled:
    """A matrix [O, I] on the device, for inputs that are rounded to NVFP4 with a static scale.

    Attributes:
        rows: e2m1 numbers and the scales of groups.
        in_features: I, without padding.
        factor: float32 [1], or [O] for outputs with scales of their own (stacked matrices): the
            scale of the weights times that of the inputs.
        unit: float32 [1] of 1: the product takes a scale of each side.
    """

    rows: Fp4Rows
    in_features: int
    factor: Tensor
    unit: Tensor

    @property
    def out_features(self) -> int:
        """O."""
        return self.rows.codes_TB.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.rows.codes_TB, self.rows.scales, self.factor, self.unit)
        return sum(tensor.nbytes for tensor in tensors)


def takes(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether the kernel takes these matrices: groups of 16 whose scales have no sign."""
    outputs = sum(weight.out_features for weight in weights)
    return outputs % _UNIT == 0 and all(
        weight.kind == "fp4"
        and weight.group_size == FP4_GROUP
        and weight.in_features % FP4_GROUP == 0
        and torch.equal(weight.scales.to(torch.float8_e4m3fn).float().abs(), weight.scales)
        for weight in weights
    )


def pack(
    weights: Sequence[QuantizedWeight], input_scale: Tensor, device: torch.device, upload: Upload
) -> BlockScaled:
    """Stack by rows, and put scales in the order of the kernel.

    Args:
        weights: matrices that `takes` accepts.
        input_scale: float32 [1]: the static scale of the inputs.
        device: the device.
        upload: copies to the device.
    """
    whole = stack(list(weights))
    assert whole.row_scales is not None, "fp4 weights have row scales"
    data, width = whole.data, padded_columns(whole.in_features) // 2
    codes_OB = torch.empty(len(data), width, dtype=torch.uint8, device=device)
    upload.copy(codes_OB, F.pad(data, (0, width - data.shape[1])))
    factor_O = whole.row_scales[:, 0] * input_scale.cpu()
    if bool((factor_O == factor_O[0]).all()):
        factor_O = factor_O[:1]
    return BlockScaled(
        rows=Fp4Rows(
            codes_OB.view(torch.float4_e2m1fn_x2),
            tiled_scales(whole.scales.to(torch.float8_e4m3fn)).to(device),
        ),
        in_features=whole.in_features,
        factor=factor_O.to(device, copy=True),
        unit=torch.ones(1, device=device),
    )


def multiply(x_TI: Tensor, input_scale: Tensor, w: BlockScaled) -> Tensor:
    """Round x to NVFP4 with the scale of `pack`, times the matrix: [T, O] in the dtype of x."""
    if not x_TI.shape[0]:
        return x_TI.new_empty((0, w.out_features))
    return _multiply(fp4_rows(x_TI, input_scale), w, x_TI.dtype)


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the device has the kernel, and the kernel gives known products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    try:
        shares = [_error_share(device, dtype, apart=False) for dtype in _DTYPES]
        shares.append(_error_share(device, torch.bfloat16, apart=True))
    except (AttributeError, RuntimeError, NotImplementedError, ValueError) as error:
        _LOG.info(
            "fp4 products by Triton: %s has no torch.nn.functional.scaled_mm for fp4 (%s)",
            device,
            str(error).splitlines()[0],
        )
        return False
    if not all(share < _BOUND for share in shares):  # NaN is not
        _LOG.warning(
            "fp4 products by Triton: torch.nn.functional.scaled_mm on %s is off by %s of the "
            "greatest number, more than %.3g",
            device,
            shares,
            _BOUND,
        )
        return False
    return True


def _error_share(device: torch.device, dtype: torch.dtype, *, apart: bool) -> float:
    """Greatest error of a known product on the device, over its greatest number."""
    rows, outputs, inputs = _SHAPE
    x, w = _random(rows, inputs, seed=0), _random(outputs, inputs, seed=1)
    if apart:
        w = replace(w, row_scales=torch.linspace(0.5, 1.5, outputs)[:, None])
    expected = x.dequantize() @ w.dequantize().T
    upload, scale = Upload(device, chunk_bytes=1 << 20), torch.ones(1)
    given, packed = (pack([matrix], scale, device, upload) for matrix in (x, w))
    actual = _multiply(given.rows, packed, dtype).float().cpu()
    return float((actual - expected).abs().max() / expected.abs().max())


def _random(rows: int, columns: int, seed: int) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator)
    scales = torch.rand(rows, columns // FP4_GROUP, generator=generator) + 0.5
    return QuantizedWeight(
        kind="fp4",
        in_features=columns,
        data=codes.to(torch.uint8),
        scales=scales.to(torch.float8_e4m3fn).float(),
        row_scales=torch.ones(rows, 1),
        group_size=FP4_GROUP,
    )


def _multiply(x: Fp4Rows, w: BlockScaled, dtype: torch.dtype) -> Tensor:
    """Outputs with scales of their own are scaled by a pass of their own, from float32."""
    recipe, swizzle = [F.ScalingType.BlockWise1x16], [F.SwizzleType.SWIZZLE_32_4_4]
    scale_x, scale_w = [x.scales], [w.rows.scales]
    joint = w.factor.numel() == 1
    if joint:
        recipe.append(F.ScalingType.TensorWise)
        swizzle.append(F.SwizzleType.NO_SWIZZLE)
        scale_x.append(w.unit)
        scale_w.append(w.factor)
    y_TO: Tensor = F.scaled_mm(
        x.codes_TB,
        w.rows.codes_TB.t(),
        scale_x,
        recipe,
        scale_w,
        recipe,
        swizzle,
        swizzle,
        output_dtype=dtype if joint else torch.float32,
    )
    if joint:
        return y_TO
    return torch.mul(y_TO, w.factor, out=torch.empty_like(y_TO, dtype=dtype))

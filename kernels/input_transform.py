"""Transforms of the inputs of a quantized product: a new order of columns, rounding.

Defines the transforms, and the products of transformed inputs by means of a backend's plain ones.
Knows matrices; knows nothing of checkpoint formats. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from arriero.kernels.input_levels import int8_rows, static_float8, static_levels
from arriero.kernels.quantized_weight import FP8_MAX, nonzero
from arriero.kernels.rounded_rows import InputRows, RoundedRows

if TYPE_CHECKING:
    from arriero.kernels.ops import Ops
    from arriero.kernels.packed_weights import Linear

Levels = Literal["fp8", "int8", "fp4"]
"""Numbers that inputs are rounded to: float8_e4m3fn, int8, or e2m1 in groups of 16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputTransform:
    """Transform of the inputs of a quantized matrix product before the multiplication.

    Attributes:
        num_inputs: number of inputs.
        order_I: int64 [columns of the matrix]: index of the input for each column (GPTQ's
            act-order); any index for a column of zeros. None: column i multiplies input i.
        levels: numbers that the inputs are rounded to, with a `bound` or a `scale`.
        bound: each row of inputs is rounded with its own scale: to float8 by `quantize_rows`, with
            a scale of at most bound / 448 (inf for no bound); to int8 by `int8_rows`. None: no
            such rounding.
        scale: float32 [1]: all inputs are rounded with this scale by `static_levels`, as a
            checkpoint states it (`input_scale`). None: no such rounding.
    """

    num_inputs: int
    order_I: Tensor | None = None
    levels: Levels = "fp8"
    bound: float | None = None
    scale: Tensor | None = None

    @property
    def rounds(self) -> bool:
        """Whether inputs are rounded."""
        return self.bound is not None or self.scale is not None

    @property
    def float8(self) -> bool:
        """Whether inputs are rounded to float8."""
        return self.rounds and self.levels == "fp8"

    @property
    def nbytes(self) -> int:
        """Bytes beside the matrix."""
        tensors = (self.order_I, self.scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device) -> InputTransform:
        """The transform with its tensors on a device."""
        return replace(
            self,
            order_I=None if self.order_I is None else self.order_I.to(device),
            scale=None if self.scale is None else self.scale.to(device),
        )


def quantize_rows(x_TI: Tensor, bound: float = math.inf) -> tuple[Tensor, Tensor]:
    """Round each row to float8_e4m3fn with a scale for each row: x is close to q * scale.

    The scale is min(greatest magnitude, bound) / 448, and 1 for a row of zeros; magnitudes above
    the bound become 448. The same rounding of activations as in `fbgemm_fp8` (bound 1200) and in
    compressed-tensors with dynamic token scales (no bound).

    Returns:
        q float8_e4m3fn [T, I], scale float32 [T, 1].
    """
    x_TI = x_TI.float()
    scale_T1 = nonzero(x_TI.abs().amax(1, keepdim=True).clamp(max=bound) / FP8_MAX)
    return (x_TI / scale_T1).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale_T1


def rounded(ops: Ops, x_TI: Tensor, inputs: InputTransform) -> tuple[Tensor, Tensor]:
    """Round the inputs of a product.

    Returns:
        Levels float32 [T, I], and their scale, float32 [T, 1] or [1]: x is close to q * scale.
    """
    if inputs.float8:
        q_TI, scale = float8_rows(ops, x_TI, inputs)
        return q_TI.float(), scale
    if inputs.scale is not None:
        return static_levels(x_TI, inputs.scale, inputs.levels), inputs.scale
    assert inputs.levels == "int8", "the caller checks that inputs are rounded"
    return int8_rows(x_TI)


def float8_rows(ops: Ops, x_TI: Tensor, inputs: InputTransform) -> tuple[Tensor, Tensor]:
    """Round the inputs of a product to float8.

    Returns:
        Levels float8_e4m3fn [T, I], and their scale, float32 [T, 1] or [1].
    """
    if inputs.scale is not None:
        return static_float8(x_TI, inputs.scale), inputs.scale
    assert inputs.bound is not None, "the caller checks that inputs are rounded"
    return ops.quantize_rows(x_TI, inputs.bound)


def linear(ops: Ops, x: InputRows, w: Linear) -> Tensor:
    """`Ops.linear` for weights with `inputs`: transform x, then multiply without `inputs`."""
    assert w.inputs is not None, "weights of pack_transformed have inputs"
    if isinstance(x, Tensor) and w.inputs.order_I is not None:
        x = x.index_select(1, w.inputs.order_I)
    scale: Tensor | None = None
    if isinstance(x, RoundedRows):
        q_TI, scale = x.levels_TI.float(), x.scale_T1
    elif w.inputs.rounds:
        q_TI, scale = rounded(ops, x, w.inputs)
    else:
        q_TI = x
    y_TO = ops.linear(q_TI, replace(w, in_features=q_TI.shape[1], inputs=None, bias=None))
    if scale is not None:
        y_TO = y_TO.mul_(scale)
    return (y_TO if w.bias is None else y_TO.add_(w.bias)).to(x.dtype)


def grouped_linear(ops: Ops, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
    """`Ops.grouped_linear` for experts with `inputs`: transform x, then multiply without `inputs`.

    Raises:
        ValueError: the experts differ in rounding, or only some of them reorder inputs.
    """
    inputs = [expert.inputs for expert in experts if expert.inputs is not None]
    kinds = {(each.levels, each.bound, each.scale is None, each.order_I is None) for each in inputs}
    if len(inputs) != len(experts) or len(kinds) != 1:
        raise ValueError(
            "grouped_linear: all experts of a layer must reorder and round inputs alike"
        )
    dtype, first = x_XI.dtype, inputs[0]
    orders = [transform.order_I for transform in inputs if transform.order_I is not None]
    scales = [transform.scale for transform in inputs if transform.scale is not None]
    if orders or scales:  # those of a row are those of its expert
        row_X = torch.arange(len(x_XI), device=x_XI.device)
        expert_X = torch.bucketize(row_X, starts_E1[1:-1].long(), right=True)
        if orders:
            x_XI = x_XI.gather(1, torch.stack(orders)[expert_X])
        if scales:
            first = replace(first, scale=torch.stack(scales)[expert_X])  # [X, 1]
    plain = [replace(expert, in_features=x_XI.shape[1], inputs=None) for expert in experts]
    if not first.rounds:
        return ops.grouped_linear(x_XI, plain, starts_E1)
    q_XI, scale_X1 = rounded(ops, x_XI, first)
    y_XO = ops.grouped_linear(q_XI, plain, starts_E1)
    return y_XO.mul_(scale_X1).to(dtype)

"""A matrix or a slice of a matrix as read from a checkpoint: stored numbers, and change of inputs.

Knows matrices; knows nothing of files and of the layouts of forms.

Shape legend: O rows (outputs), I columns (inputs), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.nibbles import pack_columns


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredProduct:
    """A matrix or a slice of a matrix, and the change that the form makes to the inputs.

    Attributes:
        weight: plain matrix [O, I] (a view of the file), or quantized matrix.
        inputs: None if column i multiplies the unchanged input i. Columns sorted by group (GPTQ
            with act-order) can include padding columns, which name input 0 and are exactly zero.
    """

    weight: Tensor | QuantizedWeight
    inputs: InputTransform | None = None

    def dense(self) -> Tensor:
        """The matrix in usual column order, float32 [O, inputs]; for tests, not for inference."""
        if isinstance(self.weight, Tensor):
            return self.weight.float()
        full_OI = self.weight.dequantize()
        if self.inputs is None or self.inputs.order_I is None:
            return full_OI
        out_OI = torch.zeros(full_OI.shape[0], self.inputs.num_inputs)
        return out_OI.index_add_(1, self.inputs.order_I, full_OI)


def four_bits(
    levels_IO: Tensor,
    zeros_GO: Tensor,
    scales_GO: Tensor,
    group: int,
    inputs: InputTransform | None = None,
) -> StoredProduct:
    """A matrix of four-bit levels, uint8, with `group` columns to a scale and a zero point."""
    return StoredProduct(
        weight=QuantizedWeight(
            kind="int4",
            in_features=levels_IO.shape[0],
            data=pack_columns(levels_IO),
            scales=scales_GO.t().contiguous(),
            zeros=zeros_GO.t().float().contiguous(),
            group_size=group,
        ),
        inputs=inputs,
    )

"""Reads a matrix stored as eight-bit numbers, or plain: `weight`, and `weight_scale`.

The layout of `fbgemm_fp8`, of ModelOpt's FP8 and of compressed-tensors' float8 and int8, as
published: `weight` float8 or int8 [out, in], `weight_scale` [out, 1], or one scale for the matrix;
`input_scale`, one scale for the inputs, where activations have a static scale.
"""

from __future__ import annotations

import torch

from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct


def read(matrix: StoredMatrix) -> StoredProduct:
    """The slice; a matrix of another dtype is plain."""
    weight_OI = matrix.cut("weight", matrix.rows, matrix.columns)
    if weight_OI.dtype not in (torch.float8_e4m3fn, torch.int8):
        return StoredProduct(weight=weight_OI)
    num_columns = weight_OI.shape[1]
    return StoredProduct(
        weight=QuantizedWeight(
            kind="int8" if weight_OI.dtype == torch.int8 else "fp8",
            in_features=num_columns,
            data=weight_OI,
            scales=matrix.row_scales("weight_scale", weight_OI.shape[0]),
            group_size=num_columns,
        ),
        inputs=matrix.inputs(num_columns),
    )

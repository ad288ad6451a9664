"""Products whose weights take the scales of the KV cache.

A row of the key or value projection is multiplied by 1 / scale; the projection after attention,
whose inputs come divided by the scale of values, is multiplied by that scale. All factors are
powers of two, so that no weight is rounded. Knows products; knows nothing of layers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.stored_product import StoredProduct


def multiplied(product: StoredProduct, factor: float) -> StoredProduct:
    """The product with its outputs multiplied by a power of two."""
    if factor == 1.0:
        return product
    return replace(product, weight=_weight(product.weight, factor))


def for_divided_inputs(product: StoredProduct, divisor: float) -> StoredProduct:
    """The product for inputs that come divided by a power of two; the outputs are the same."""
    if divisor == 1.0:
        return product
    inputs = None if product.inputs is None else _divided(product.inputs, divisor)
    return replace(multiplied(product, divisor), inputs=inputs)


def _weight(weight: Tensor | QuantizedWeight, factor: float) -> Tensor | QuantizedWeight:
    if isinstance(weight, Tensor):
        # float16 has few exponents: small products would lose digits
        return (weight.float() if weight.dtype == torch.float16 else weight) * factor
    if weight.row_scales is not None:  # fp4: the scales of groups must stay float8 numbers
        return replace(weight, row_scales=weight.row_scales * factor)
    return replace(weight, scales=weight.scales * factor, half_scales=False)


def _divided(inputs: InputTransform, divisor: float) -> InputTransform:
    """The same rounding of inputs that come divided: to the same levels."""
    return replace(
        inputs,
        bound=None if inputs.bound is None else inputs.bound / divisor,
        scale=None if inputs.scale is None else inputs.scale / divisor,
    )

"""Packed weights, as a backend returns them: only the backend reads the packed form.

Knows sizes; knows nothing of the layers that hold the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from arriero.kernels.input_transform import InputTransform


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """Packed weights of y = x Wᵀ + b. Made by `Ops.pack_linear`; only the backend reads `packed`.

    With `inputs`, x is transformed before the product; see `Ops.pack_transformed`.
    """

    out_features: int
    in_features: int
    packed: Any
    bias: Tensor | None
    nbytes: int
    inputs: InputTransform | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocab:
    """Packed vocabulary rows [first_row, first_row + num_rows) for embedding, head, or both."""

    first_row: int
    num_rows: int
    hidden_size: int
    packed: Any
    nbytes: int

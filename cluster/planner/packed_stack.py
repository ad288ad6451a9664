"""A packed matrix or vector of a rank: size, precision and bytes.

Knows sizes; knows nothing of models and of how the bytes come about (`rank_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.kernels.sizes import Precision
from arriero.shards.checkpoint.formats.modules import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStack:
    """A matrix or vector of a rank, as the runner packs the modules, with the number of each.

    Attributes:
        kind: kind of the modules.
        num_modules: modules in the matrix: 3 for q, k and v, 2 for gate and up.
        rows, columns: size of the matrix on the rank; a vector has 0 columns.
        precision: precision of the numbers.
        weights, scales: bytes of a matrix, and of the scales.
        copies: experts of the rank with a matrix each in a layer; else 1.
        times: number of layers or places of the stage with the matrix.
    """

    kind: Kind
    num_modules: int
    rows: int
    columns: int
    precision: Precision
    weights: int
    scales: int
    copies: int
    times: int

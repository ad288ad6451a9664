"""Bytes of packed matrices and KV blocks in each backend, padding included.

The arithmetic of the sizes that `Ops.pack_linear`, `pack_vocab`, `pack_quantized` and `kv_cache`
allocate: tests compare it with the backends. Knows sizes; knows nothing of tensors, needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernels = Literal["reference", "cpu", "triton"]
Precision = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]

KERNELS: tuple[Kernels, ...] = ("reference", "cpu", "triton")
PLAIN = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_ITEMSIZE = PLAIN | {"int8": 1}

_PANEL = 32  # rows of a panel, cpu
_LANES = 16  # slots, and values, of a group, cpu
_FLOAT = 4  # scales and zero points are float32 in every backend


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBytes:
    """Bytes of a packed matrix."""

    weights: int
    scales: int

    @property
    def total(self) -> int:
        """All bytes, as in `Linear.nbytes`."""
        return self.weights + self.scales


def packed_nbytes(
    kernels: Kernels,
    out_features: int,
    in_features: int,
    precision: Precision,
    *,
    group_size: int = 128,
    zeros: bool = True,
    bias: bool = False,
) -> PackedBytes:
    """Bytes that a backend allocates for a matrix [out, in]; stacked matrices count as a whole.

    Args:
        kernels: the backend.
        out_features: rows.
        in_features: columns.
        precision: precision of the weights.
        group_size: int4: columns that share a scale.
        zeros: int4: the weights have zero points.
        bias: the matrix has a bias.
    """
    rows = out_features
    pairs = -(-in_features // 2)
    if kernels == "cpu":
        rows = -(-out_features // _PANEL) * _PANEL
    groups = -(-in_features // group_size) if precision == "int4" else 1
    scales = rows * groups * _FLOAT * (2 if precision == "int4" and zeros else 1)
    if precision in PLAIN:
        columns = 2 * pairs if kernels == "cpu" else in_features
        data, scales = rows * columns * PLAIN[precision], 0
    elif precision == "int4":
        half = -(-min(group_size, in_features) // 2)
        data = rows * (groups * half if kernels == "triton" else pairs)
    else:
        data = rows * (2 * pairs if kernels == "cpu" else in_features)
    if bias:
        data += rows * (_FLOAT if kernels != "triton" else PLAIN.get(precision, 2))
    return PackedBytes(weights=data, scales=scales)


def kv_block_nbytes(
    kernels: Kernels, *, kv_heads: int, head_dim: int, block_size: int, dtype: str
) -> int:
    """Bytes that a backend allocates for a KV block of a layer.

    Raises:
        KeyError: no cache has this dtype.
    """
    itemsize = KV_ITEMSIZE[dtype]
    slots, values = block_size, head_dim
    if kernels == "cpu":
        slots = -(-block_size // _LANES) * _LANES
        values = -(-head_dim // _LANES) * _LANES
    scales = 2 * slots * _FLOAT if dtype == "int8" else 0
    return kv_heads * (slots * (head_dim + values) * itemsize + scales)

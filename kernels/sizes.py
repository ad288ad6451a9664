"""The shapes that a backend's byte counts start from: a packed matrix, a KV block.

Knows sizes; knows nothing of tensors and of backends. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4", "fp4"]

PLAIN = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number of an unquantized matrix."""
KV_ITEMSIZE = PLAIN | {"int8": 1, "fp8": 1}
"""Bytes of a number in the KV cache."""
FLOAT = 4
"""Bytes of a scale or a zero point: float32 in every backend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixSize:
    """A matrix to pack; stacked matrices count as a whole.

    Attributes:
        out_features: rows.
        in_features: columns.
        precision: precision of the weights.
        group_size: int4, fp4: columns that share a scale.
        zeros: int4: the weights have zero points.
        half_scales: int4: scales and zero points are numbers of float16.
        bias: the matrix has a bias.
    """

    out_features: int
    in_features: int
    precision: Precision
    group_size: int = 128
    zeros: bool = True
    half_scales: bool = False
    bias: bool = False

    @property
    def four_bits(self) -> bool:
        """Whether a byte holds two columns, and scales belong to groups of columns."""
        return self.precision in ("int4", "fp4")

    @property
    def byte_columns(self) -> int:
        """Bytes of a four-bit row without padding: two columns a byte."""
        return -(-self.in_features // 2)

    @property
    def num_groups(self) -> int:
        """Scales of a row, of a quantized matrix."""
        return -(-self.in_features // self.group_size) if self.four_bits else 1

    def scales_nbytes(self, rows: int) -> int:
        """Bytes of the scales of groups and zero points of `rows` rows, padding rows included."""
        if self.precision in PLAIN:
            return 0
        numbers = 2 if self.precision == "int4" and self.zeros else 1
        return rows * self.num_groups * numbers * FLOAT


@dataclass(frozen=True, kw_only=True, slots=True)
class KvBlockSize:
    """A KV block of a layer.

    Attributes:
        kv_heads: key/value heads of the slice.
        head_dim: numbers of a head.
        block_size: tokens of a block.
        dtype: dtype of the cache, a name of `KV_ITEMSIZE`.
    """

    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    def nbytes(self, *, slots: int, value_dim: int) -> int:
        """Bytes with `slots` slots for tokens and `value_dim` numbers of a value, padding included.

        Raises:
            KeyError: no cache has this dtype.
        """
        numbers = slots * (self.head_dim + value_dim) * KV_ITEMSIZE[self.dtype]
        scales = 2 * slots * FLOAT if self.dtype == "int8" else 0
        return self.kv_heads * (numbers + scales)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBytes:
    """Bytes of a packed matrix."""

    weights: int
    scales: int

    @property
    def total(self) -> int:
        """All bytes, as in `Linear.nbytes`."""
        return self.weights + self.scales


LORA_PADDING = 16
"""Rows of an adapter's matrices end at a multiple of this number of elements; the rest is 0."""


def lora_bank_nbytes(num_slots: int, max_rank: int, ins: int, outs: int, element_bytes: int) -> int:
    """Bytes of a bank of adapters, as `lora.make_bank` allocates them.

    Args:
        num_slots: slots.
        max_rank: largest rank of an adapter.
        ins: inputs of the product.
        outs: outputs of the product.
        element_bytes: bytes of a number.
    """
    padded = sum(-(-size // LORA_PADDING) * LORA_PADDING for size in (ins, outs))
    return num_slots * (max_rank * padded * element_bytes + 4)


def embedding_lora_nbytes(
    num_slots: int, max_rank: int, num_rows: int, outs: int, element_bytes: int
) -> int:
    """Bytes of the adapters of a table, as `lora.make_embedding_lora` allocates them.

    Args:
        num_slots: slots.
        max_rank: largest rank of an adapter.
        num_rows: rows of the table on the rank.
        outs: columns of the table.
        element_bytes: bytes of an element.
    """
    table = num_slots * num_rows * max_rank * element_bytes
    return table + lora_bank_nbytes(num_slots, max_rank, max_rank, outs, element_bytes)


def num_mask_words(vocab_size: int) -> int:
    """Number of 32-bit words of a mask with a bit for each token."""
    return -(-vocab_size // 32)

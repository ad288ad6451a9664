"""Reads a matrix of compressed-tensors' `pack-quantized` form.

The layout as published: `weight_packed` int32 [out, in / 8], low nibble first (four bits; a byte
for each number with eight), `weight_scale` [out, groups], `weight_shape`, and where they exist
`weight_zero_point` [out / 8, groups] and `weight_g_idx` [in] (act-order).

Shape legend: O rows (outputs), I columns (inputs), B bytes, G groups of columns, W words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.kernels.quantized_weight import INT4_ZERO, QuantizedWeight
from arriero.shards.checkpoint.formats.column_groups import (
    group_index,
    groups_of,
    sorted_by_index,
)
from arriero.shards.checkpoint.formats.nibbles import (
    NIBBLES,
    trim,
    unpack_columns,
    unpack_rows,
    word_span,
)
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span


def read(matrix: StoredMatrix) -> StoredProduct:
    """The slice."""
    name, scheme = matrix.name, matrix.scheme
    stated = matrix.whole("weight_shape").tolist()
    words_OW = matrix.cut("weight_packed", matrix.rows, None)
    num_columns = words_OW.shape[1] * 32 // scheme.bits
    if stated != [matrix.shape("weight_packed")[0], num_columns]:
        raise CheckpointError(
            f"tensor {name + '.weight_shape'!r} says {stated}, but {num_columns} columns are "
            "stored; fetch the checkpoint again"
        )
    if scheme.bits == 8:
        return _eight_bits(matrix, words_OW, num_columns)
    if scheme.act_order:
        group_of_I = group_index(matrix, "weight_g_idx", num_columns)
        if group_of_I is not None:
            return _by_index(matrix, words_OW, num_columns, group_of_I)
    own, groups = matrix.own_columns(num_columns), groups_of(matrix, num_columns)
    if own.start % 2:
        raise CheckpointError(
            f"{name}: columns {own.start}:{own.stop} begin inside a byte; "
            "use a tp (or tp_shares) that cuts at even columns"
        )
    zeros_GO = _zeros(matrix, groups.needed, words_OW.shape[0])
    scales_OG = matrix.scales("weight_scale", matrix.rows, groups.needed)
    return StoredProduct(
        weight=QuantizedWeight(
            kind="int4",
            in_features=own.size,
            data=words_OW.view(torch.uint8)[:, own.start // 2 : -(-own.stop // 2)],
            scales=scales_OG[:, groups.index_G],
            zeros=None if zeros_GO is None else zeros_GO.t()[:, groups.index_G].float(),
            group_size=groups.size,
        )
    )


def _eight_bits(matrix: StoredMatrix, words_OW: Tensor, num_columns: int) -> StoredProduct:
    own = matrix.own_columns(num_columns)
    bytes_OI = words_OW.view(torch.uint8)[:, own.start : own.stop]
    levels_OI = bytes_OI ^ 0x80  # stored with an offset of 128
    return StoredProduct(
        weight=QuantizedWeight(
            kind="int8",
            in_features=own.size,
            data=levels_OI.view(torch.int8),
            scales=matrix.scales("weight_scale", matrix.rows, None),
            group_size=own.size,
        )
    )


def _by_index(
    matrix: StoredMatrix, words_OW: Tensor, num_columns: int, group_of_I: Tensor
) -> StoredProduct:
    """A slice with the group of each column in `weight_g_idx` (act-order)."""
    own = matrix.own_columns(num_columns)
    levels_IO = unpack_columns(words_OW, range(NIBBLES))[:, own.start : own.stop].t()
    scales_GO = matrix.scales("weight_scale", matrix.rows, None).t()
    zeros_GO = _zeros(matrix, None, words_OW.shape[0])
    if zeros_GO is None:
        zeros_GO = torch.full(scales_GO.shape, int(INT4_ZERO), dtype=torch.uint8)
    return sorted_by_index(matrix, "weight_g_idx", group_of_I, levels_IO, zeros_GO, scales_GO)


def _zeros(matrix: StoredMatrix, groups: Span | None, num_rows: int) -> Tensor | None:
    """Zero points uint8 [G, O] of `groups`; None if each zero point is the middle level."""
    if matrix.scheme.symmetric:
        return None
    packed_WG = matrix.cut("weight_zero_point", word_span(matrix.rows), groups)
    return trim(unpack_rows(packed_WG).t(), matrix.rows)[:, :num_rows]

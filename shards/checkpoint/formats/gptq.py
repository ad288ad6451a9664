"""Reads a matrix of a GPTQ checkpoint (Frantar et al., 2022), versions 1 and 2 of the layout.

`qweight` int32 [in / 8, out], `qzeros` int32 [groups, out / 8], `scales` [groups, out], and
`g_idx` [in], the group of each column (act-order).

Shape legend: O rows (outputs), I columns (inputs), G groups of columns.
"""

from __future__ import annotations

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
)
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct, four_bits
from arriero.shards.layout.dense import Span


def read(matrix: StoredMatrix) -> StoredProduct:
    """The slice."""
    num_inputs = matrix.shape("qweight")[0] * NIBBLES
    own = matrix.own_columns(num_inputs)
    words = Span(start=own.start // NIBBLES, stop=-(-own.stop // NIBBLES))
    levels_IO = unpack_rows(matrix.cut("qweight", words, matrix.rows))
    first = own.start - words.start * NIBBLES
    levels_IO = levels_IO[first : first + own.size]
    group_of_I = group_index(matrix, "g_idx", num_inputs)
    groups = groups_of(matrix, num_inputs) if group_of_I is None else None
    needed = None if groups is None else groups.needed
    zeros_GO = unpack_columns(matrix.words("qzeros", needed), range(NIBBLES))
    zeros_GO = trim(zeros_GO, matrix.rows) + matrix.scheme.zero_offset & 15
    scales_GO = matrix.scales("scales", needed, matrix.rows)
    if groups is not None:
        index_G = groups.index_G
        return four_bits(levels_IO, zeros_GO[index_G], scales_GO[index_G], groups.size)
    assert group_of_I is not None, "columns without order have an index"
    return sorted_by_index(matrix, "g_idx", group_of_I, levels_IO, zeros_GO, scales_GO)

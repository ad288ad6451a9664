"""Reads a matrix of an AWQ checkpoint (Lin et al., 2023), "gemm" packing.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` [groups, out].

Shape legend: O rows (outputs), I columns (inputs), G groups of columns.
"""

from __future__ import annotations

from arriero.shards.checkpoint.formats.column_groups import groups_of
from arriero.shards.checkpoint.formats.nibbles import trim, unpack_columns
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct, four_bits

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of a word: nibble i holds column `ORDER[i]` of eight."""


def read(matrix: StoredMatrix) -> StoredProduct:
    """The slice."""
    groups = groups_of(matrix, matrix.shape("qweight")[0])
    levels_IO = unpack_columns(matrix.words("qweight", matrix.columns), ORDER)
    zeros_GO = unpack_columns(matrix.words("qzeros", groups.needed), ORDER)
    zeros_GO = trim(zeros_GO, matrix.rows)
    scales_GO = matrix.scales("scales", groups.needed, matrix.rows)
    index_G = groups.index_G
    return four_bits(
        trim(levels_IO, matrix.rows), zeros_GO[index_G], scales_GO[index_G], groups.size
    )

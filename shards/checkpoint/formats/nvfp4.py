"""Reads a matrix of ModelOpt's NVFP4 form.

The layout as published: `weight` uint8 [out, in / 2], an even column in the low half of a byte, as
e2m1 codes; `weight_scale` float8 [out, in / 16]; `weight_scale_2` and `input_scale`, one number
each. An element is number * weight_scale * weight_scale_2.

Shape legend: O rows (outputs), B bytes, G groups of columns.
"""

from __future__ import annotations

from torch import Tensor

from arriero.kernels.input_levels import FP4_GROUP
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.shards.checkpoint.formats.column_groups import SliceGroups, groups_of
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span


def read(matrix: StoredMatrix) -> StoredProduct:
    """The slice."""
    num_columns = 2 * matrix.shape("weight")[1]
    own, groups = matrix.own_columns(num_columns), groups_of(matrix, num_columns)
    check_cut(matrix.name, own, num_columns, rounds=matrix.scheme.input_scale)
    scales_OG = matrix.scales("weight_scale", matrix.rows, groups.needed)
    return StoredProduct(
        weight=fp4_weight(
            matrix.cut("weight", matrix.rows, byte_span(own)),
            scales_OG,
            matrix.single_scale("weight_scale_2"),
            own,
            groups,
        ),
        inputs=matrix.inputs(own.size),
    )


def byte_span(columns: Span) -> Span:
    """The bytes of `columns`, which begin at an even column."""
    return Span(start=columns.start // 2, stop=-(-columns.stop // 2))


def fp4_weight(
    bytes_OB: Tensor, scales_OG: Tensor, scale_1: Tensor, columns: Span, groups: SliceGroups
) -> QuantizedWeight:
    """The slice from its bytes, the scales of the stored groups that it needs, and its scale."""
    return QuantizedWeight(
        kind="fp4",
        in_features=columns.size,
        data=bytes_OB,
        scales=scales_OG[:, groups.index_G],
        row_scales=scale_1.expand(len(bytes_OB), 1).contiguous(),
        group_size=groups.size,
    )


def check_cut(name: str, own: Span, num_columns: int, *, rounds: bool) -> None:
    """Refuse a cut inside a byte; and inside a group if inputs are rounded group by group.

    Raises:
        CheckpointError: the message names the columns and the remedy.
    """
    if own.start % 2:
        raise CheckpointError(
            f"{name}: columns {own.start}:{own.stop} begin inside a byte; use a tp (or tp_shares) "
            "that cuts at even columns"
        )
    cuts = [cut for cut in (own.start, own.stop) if cut != num_columns]
    if rounds and any(cut % FP4_GROUP for cut in cuts):
        raise CheckpointError(
            f"{name}: columns {own.start}:{own.stop} cut a group of {FP4_GROUP} inputs that are "
            f"rounded together; use a tp (or tp_shares) that cuts at multiples of {FP4_GROUP}"
        )

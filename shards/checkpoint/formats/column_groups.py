"""Groups of columns that share a scale: of a slice, in order or sorted by an index (act-order).

A column cut inside a group gives smaller groups; the scale is then repeated. Knows groups; knows
nothing of where a form stores levels, scales and zero points.

Shape legend: O rows (outputs), I columns (inputs), G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.shards.checkpoint.formats.form_fit import in_order, index_problem
from arriero.shards.checkpoint.formats.stored import cut_group
from arriero.shards.checkpoint.formats.stored_matrix import StoredMatrix
from arriero.shards.checkpoint.formats.stored_product import StoredProduct, four_bits
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.dense import Span


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceGroups:
    """Groups of the columns of a slice.

    Attributes:
        size: columns of the slice that share a scale.
        needed: the stored groups that the slice needs.
        index_G: for each group of the slice the index among the needed groups.
    """

    size: int
    needed: Span
    index_G: Tensor


def groups_of(matrix: StoredMatrix, num_columns: int) -> SliceGroups:
    """Groups of a slice of a matrix of `num_columns`, with consecutive columns in each group.

    Raises:
        CheckpointError: the cut gives groups that no kernel supports.
    """
    own = matrix.own_columns(num_columns)
    return slice_groups(matrix.name, own, num_columns, matrix.scheme.group_size or num_columns)


def slice_groups(name: str, own: Span, num_columns: int, whole_group: int) -> SliceGroups:
    """As `groups_of`, for columns `own` of a matrix `name` in groups of `whole_group`."""
    size = cut_group(own, num_columns, whole_group)
    if size % 2 and size < own.size:
        raise CheckpointError(
            f"{name}: columns {own.start}:{own.stop} cut a group of {whole_group} that "
            f"shares a scale into groups of {size}; use a tp (or tp_shares) that cuts at even "
            "columns"
        )
    needed = Span(start=own.start // whole_group, stop=-(-own.stop // whole_group))
    index_G = torch.arange(own.start, own.stop, size) // whole_group - needed.start
    return SliceGroups(size=size, needed=needed, index_G=index_G)


def group_index(matrix: StoredMatrix, suffix: str, num_columns: int) -> Tensor | None:
    """The group of each column of the whole matrix; None if groups are consecutive columns."""
    if not matrix.has(suffix):
        return None
    group_of_I = matrix.whole(suffix).long()
    if in_order(group_of_I, matrix.scheme.group_size or num_columns):
        return None
    return group_of_I


def sorted_by_index(
    matrix: StoredMatrix,
    suffix: str,
    group_of_I: Tensor,
    levels_IO: Tensor,
    zeros_GO: Tensor,
    scales_GO: Tensor,
) -> StoredProduct:
    """Sort the columns of a slice by group.

    Args:
        matrix: the slice.
        suffix: the tensor with the index.
        group_of_I: int64, group of each column of the whole matrix, from that tensor.
        levels_IO: uint8, levels of the slice's columns.
        zeros_GO: uint8, zero points of every group of the matrix.
        scales_GO: float32, scales of every group.

    Raises:
        CheckpointError: the index does not fit the groups.
    """
    index = f"{matrix.name}.{suffix}"
    problem = index_problem(index, group_of_I, len(scales_GO))
    if problem is not None:
        raise CheckpointError(problem)
    whole_group = matrix.scheme.group_size or len(group_of_I)
    most = int(torch.bincount(group_of_I).max())
    if matrix.pad_groups and most > whole_group:
        raise CheckpointError(
            f"tensor {index!r} gives a group {most} columns, but the group size is "
            f"{whole_group}; quantize again without act-order"
        )
    own = matrix.own_columns(len(group_of_I))
    own_I = group_of_I[own.start : own.stop]
    return _sorted(levels_IO, zeros_GO, scales_GO, own_I, whole_group if matrix.pad_groups else 0)


def _sorted(
    levels_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group_of_I: Tensor, width: int
) -> StoredProduct:
    """Sort columns by group; pad each group to `width` columns with zero elements.

    A slice of the columns holds a part of each group, so the group sizes differ. If the largest
    group has more than `width` columns, its size is the width.
    """
    num_groups = scales_GO.shape[0]
    counts_G = torch.bincount(group_of_I, minlength=num_groups)
    width = max(width, int(counts_G.max()))
    width += width % 2  # whole bytes
    order_I = torch.argsort(group_of_I, stable=True)
    starts_G = torch.cumsum(counts_G, 0) - counts_G
    place_I = torch.arange(len(order_I)) - starts_G[group_of_I[order_I]]
    place_I += group_of_I[order_I] * width
    input_order = torch.zeros(num_groups * width, dtype=torch.int64)
    input_order[place_I] = order_I
    filled_IO = zeros_GO.repeat_interleave(width, dim=0)  # level = zero point: exactly zero
    filled_IO[place_I] = levels_IO[order_I]
    inputs = InputTransform(num_inputs=len(order_I), order_I=input_order)
    return four_bits(filled_IO, zeros_GO, scales_GO, width, inputs)

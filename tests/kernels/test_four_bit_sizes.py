"""Four-bit weights on a GPU: bytes as the planner counts them, places of the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from arriero.kernels.quantize import quantize_int4
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.registry import BACKENDS
from arriero.kernels.sizes import MatrixSize
from arriero.kernels.triton.four_bit_sizes import PLANES, four_bit_form

weights = pytest.importorskip("arriero.kernels.triton.weights", reason="needs triton")
upload = pytest.importorskip("arriero.kernels.triton.upload", reason="needs triton")
CPU = torch.device("cpu")
SHAPES = [(64, 64, 32), (50, 37, 32), (1, 2, 128), (33, 130, 16), (24, 96, 32), (9, 256, 128)]
"""Rows, columns, and columns of a group."""


def quantized(rows: int, columns: int, group: int) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return quantize_int4(weight, group, search=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "full"])
def test_packed_bytes_are_the_planner_s(
    shape: tuple[int, int, int], zeros: bool, half: bool
) -> None:
    rows, columns, group = shape
    weight = quantized(*shape)
    weight = replace(weight, half_scales=half)
    weight = weight if zeros else replace(weight, zeros=None)
    bias = torch.zeros(rows, dtype=torch.bfloat16)
    matrix = MatrixSize(
        out_features=rows,
        in_features=columns,
        precision="int4",
        group_size=group,
        zeros=zeros,
        half_scales=half,
        bias=True,
    )
    packed = weights.pack_quantized([weight], None, CPU, upload.Upload(CPU))
    expected = BACKENDS["triton"].packed_nbytes(matrix).total
    assert packed.nbytes + bias.nbytes == expected
    assert (packed.out_features, packed.in_features) == (rows, columns)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_has_its_place(shape: tuple[int, int, int]) -> None:
    rows, columns, group = shape
    weight = quantized(*shape)
    packed = weights.pack_quantized([weight], None, CPU, upload.Upload(CPU))
    group = min(group, columns)
    form = four_bit_form(columns, group)
    assert packed.data.shape == form.data_shape(rows)
    levels = weight.levels()
    for row in range(rows):
        for column in range(columns):
            block, rest = divmod(column, group * form.groups)
            in_block, within = divmod(rest, group)
            plane = in_block * form.planes + within // form.words
            word = int(packed.data[row // 8, block, row % 8, within % form.words])
            assert word >> 4 * plane & 15 == levels[row, column], (row, column)
    assert packed.zeros is not None and weight.zeros is not None
    assert torch.equal(packed.zeros.T, weight.zeros)


@pytest.mark.parametrize(
    ("columns", "group", "groups", "words"),
    [(4096, 128, 1, 32), (4096, 64, 2, 32), (4096, 32, 4, 32), (4096, 16, 4, 16), (96, 32, 1, 8)],
)
def test_a_plane_has_columns_of_one_group(
    columns: int, group: int, groups: int, words: int
) -> None:
    form = four_bit_form(columns, group)
    assert (form.groups, form.words) == (groups, words)
    assert form.planes * form.groups == PLANES and form.planes * form.words == group

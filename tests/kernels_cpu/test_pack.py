"""Packed matrices hold every number in its place, whatever strides it came by."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from arriero.kernels.cpu import CpuOps
from arriero.kernels.cpu.library import find, runnable
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantized_weight import QuantizedWeight

CPU = torch.device("cpu")
SHAPES = [(16, 64), (32, 256), (40, 71), (7, 200), (129, 130), (600, 33)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=[v for v in runnable() if find(v)])
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(CPU, 2, exact_inputs=True, variant=request.param)


def read_back(ops: CpuOps, packed: Linear) -> Tensor:
    """The matrix: products with unit vectors."""
    return ops.linear(torch.eye(packed.in_features), packed).T


def strided(weight: Tensor, how: str) -> Tensor:
    """The same numbers, lying otherwise."""
    if how == "rows":
        return weight
    if how == "columns":  # as the experts of a fused tensor lie
        return weight.T.contiguous().T
    wide = torch.zeros(2 * weight.shape[0], 3 * weight.shape[1], dtype=weight.dtype)
    view = wide[::2, 1::3]
    view.copy_(weight)
    return view


@pytest.mark.parametrize("how", ["rows", "columns", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain(ops: CpuOps, dtype: torch.dtype, how: str) -> None:
    for (rows, columns), source in itertools.product(SHAPES, DTYPES):
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, columns, generator=generator).to(source)
        first = rows // 3  # stacked inside a panel
        parts = [strided(weight[:first], how), strided(weight[first:], how)]
        got = read_back(ops, ops.pack_linear(parts, None, dtype))
        assert torch.equal(got, weight.to(dtype).float()), (rows, columns, source)


@pytest.mark.parametrize("how", ["rows", "columns", "apart"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_quantized(ops: CpuOps, kind: str, how: str) -> None:
    for rows, columns in SHAPES:
        generator = torch.Generator().manual_seed(rows)
        stored = -(-columns // 2) if kind == "int4" else columns
        data = torch.randint(0, 120, (rows, stored), generator=generator, dtype=torch.uint8)
        if kind == "int8":
            data = data.view(torch.int8)
        if kind == "fp8":
            data = data.view(torch.float8_e4m3fn)
        first = rows // 3
        parts = [
            QuantizedWeight(
                kind=kind,  # type: ignore[arg-type]
                in_features=columns,
                data=strided(part.view(torch.uint8), how).view(data.dtype),
                scales=torch.ones(part.shape[0], 1),
                group_size=columns,
            )
            for part in (data[:first], data[first:])
        ]
        got = read_back(ops, ops.pack_quantized(parts, None))
        want = torch.cat([part.dequantize() for part in parts])
        assert torch.equal(got, want), (rows, columns)

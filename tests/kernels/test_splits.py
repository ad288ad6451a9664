"""Products whose columns several programs share: results, bits, and which products are split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8

from . import tolerance

tuning = pytest.importorskip("arriero.kernels.triton.tuning", reason="needs triton")
matmul = pytest.importorskip("arriero.kernels.triton.matmul", reason="needs triton")
OUTPUTS, INPUTS = 144, 1024
"""The q, k, v product of the 405B at TP8, 2304 x 16384, by a sixteenth."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def rule(processors: int, least_columns: int = 256) -> Iterator[None]:
    """A device of another size."""
    small = tuning.SplitRule(processors=processors, waves=2, least_columns=least_columns)
    with mock.patch.object(tuning, "split_rule", lambda device: small):
        yield


@pytest.fixture
def triton() -> Ops:
    from .conftest import backend

    return backend("triton")


def linear(ops: Ops, kind: str) -> tuple[Linear, torch.Tensor]:
    """A matrix in a kind of weights with a bias, and the numbers that it means."""
    weight, bias = randn(OUTPUTS, INPUTS, seed=1) / 32, randn(OUTPUTS, seed=2)
    if kind == "dense":
        return ops.pack_linear([weight], bias, torch.float32), weight
    symmetric = replace(quantize_int4(weight, 32, search=False), zeros=None)
    stored = {
        "int8": quantize_int8(weight),
        "fp8": quantize_fp8(weight),
        "int4": quantize_int4(weight, 128, search=False),
        "int4 symmetric": symmetric,
    }[kind]
    return ops.pack_quantized([stored], bias), stored.dequantize()


@pytest.mark.parametrize("kind", ["dense", "int8", "fp8", "int4", "int4 symmetric"])
def test_parts_give_the_product_and_the_same_bits_for_any_rows(triton: Ops, kind: str) -> None:
    """A row alone, whose parts several programs compute, and many rows, by programs in turn."""
    packed, weight = linear(triton, kind)
    x = randn(70, INPUTS, seed=3)
    with rule(processors=2), launches() as splits:
        rows = torch.cat([triton.linear(x[:1], packed), triton.linear(x[1:], packed)])
        assert torch.equal(triton.linear(x, packed), rows)
    assert splits == ["programs", "in turn", "in turn"]
    x64, w64 = x.double().numpy(), weight.double().numpy()
    expected = x64 @ w64.T + randn(OUTPUTS, seed=2).double().numpy()
    bound = 3 * tolerance.product(x64, w64, torch.float32) + 4 * tolerance.U32
    tolerance.check(rows, expected, bound)
    with rule(processors=1):
        torch.testing.assert_close(triton.linear(x, packed), rows, rtol=1e-4, atol=1e-4)


def test_counters_are_ready_for_the_next_product(triton: Ops) -> None:
    packed, _ = linear(triton, "int8")
    x = randn(3, INPUTS, seed=4)
    with rule(processors=64):
        first = triton.linear(x, packed)
        assert torch.equal(triton.linear(x, packed), first)
    assert not triton._arrivals.any()  # type: ignore[attr-defined]


def test_which_products_are_split() -> None:
    """The parts on a device of 132 multiprocessors, by tiles and columns."""
    device = tuning.SplitRule(processors=132, waves=2, least_columns=1024)
    parts = {
        (2304, 16384): 7,
        (4608, 16384): 3,
        (4096, 4096): 4,
        (4096, 14336): 4,
        (13312, 16384): 1,
        (2304, 1000): 1,
    }
    for (outputs, inputs), expected in parts.items():
        assert tuning.num_splits(device, -(-outputs // 64), inputs) == expected, (outputs, inputs)


@contextmanager
def launches() -> Iterator[list[str]]:
    """Which way each product took."""
    seen: list[str] = []
    split = matmul._split

    def noted(*args: object) -> tuple[str, int]:
        chosen: tuple[str, int] = split(*args)
        seen.append(chosen[0])
        return chosen

    with mock.patch.object(matmul, "_split", noted):
        yield seen

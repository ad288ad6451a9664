"""Products of int8 and int4 weights with inputs rounded to int8: `activation_dtype`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arriero.kernels.cpu.backend import CpuOps
from arriero.kernels.cpu.structs import packed_of
from arriero.kernels.cpu.weights import INT4_DOT, INT8_DOT
from arriero.kernels.input_levels import LEVEL_GROUP, int8_groups
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight

from .small import CPU, VARIANTS

pytestmark = pytest.mark.skipif(not VARIANTS, reason="the CPU kernels are not built")

COLUMNS = 1056
KINDS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int4-32": lambda w: quantize_int4(w, 32, search=False),
    "int4-half": lambda w: quantize_int4(w, 32, search=False, half=True),
    "int4-96": lambda w: quantize_int4(w, 96, search=False),
    "int4-row": lambda w: quantize_int4(w, COLUMNS, search=False),
    "int4-zero-8": lambda w: replace(quantize_int4(w, 32, search=False), zeros=None),
}


def rounding(variant: str, threads: int = 1) -> CpuOps:
    return CpuOps(CPU, threads, activation_dtype="int8", variant=variant)


def rounds(linear: Linear) -> bool:
    return packed_of(linear.packed).struct.type in (INT8_DOT, INT4_DOT)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_levels(variant: str, kind: str) -> None:
    """Near the product of the rounded inputs in float64; each row as alone, on any threads."""
    weight, bias = KINDS[kind](random(131, COLUMNS)), random(131, seed=1)
    x = random(33, COLUMNS, seed=2) * torch.logspace(-6, 6, 33)[:, None]
    ops = rounding(variant)
    linear = ops.pack_quantized([weight.rows(0, 50), weight.rows(50, 131)], bias)
    assert rounds(linear)
    y = ops.linear(x, linear)
    level, scale = int8_groups(x)
    rounded = level.double() * scale.double().repeat_interleave(LEVEL_GROUP, 1)
    expected = rounded @ weight.dequantize().double().t() + bias.double()
    size = rounded.abs() @ weight.dequantize().double().abs().t() + 1.0
    assert float(((y - expected) / size).abs().max()) < 1e-5
    other = rounding(variant, threads=2)
    shared = other.pack_quantized([weight], bias)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 25):
        assert torch.equal(ops.linear(x[:rows], linear), y[:rows]), rows
        assert torch.equal(other.linear(x[33 - rows :], shared), y[33 - rows :]), rows


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_whole_numbers_are_exact(variant: str, kind: str) -> None:
    """Inputs and weights that are levels: sums to the bit, at the greatest magnitudes too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (7, 128), generator=generator).float()
    x[:, ::LEVEL_GROUP] = 127.0  # so that the scale of each group is 1
    x[1], x[2] = 127.0, -127.0
    low, high, dtype = (-127, 128, torch.int8) if kind == "int8" else (0, 256, torch.uint8)
    data = torch.randint(low, high, (40, 128 if kind == "int8" else 64), generator=generator)
    data[0], data[1] = low, high - 1
    groups = 1 if kind == "int8" else 4
    weight = QuantizedWeight(
        kind="int8" if kind == "int8" else "int4",
        in_features=128,
        data=data.to(dtype),
        scales=torch.ones(40, groups),
        group_size=128 // groups,
    )
    ops = rounding(variant)
    y = ops.linear(x, ops.pack_quantized([weight], None))
    assert torch.equal(y.double(), x.double() @ weight.dequantize().double().t())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_table_keeps_its_rows(variant: str) -> None:
    weight = quantize_int8(random(45, 96))
    ops = rounding(variant)
    vocab = ops.pack_quantized_vocab(weight, 0)
    assert torch.equal(ops.embed(torch.arange(45).int(), vocab), weight.dequantize())
    x = random(3, 96, seed=1)
    logits = ops.logits(x, torch.ones(96), 1e-5, vocab)
    normed = ops.rms_norm(x, torch.ones(96), 1e-5)
    assert torch.equal(logits, ops.linear(normed, ops.pack_quantized([weight], None)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_and_broken_inputs(variant: str) -> None:
    """Tiny groups are zeros; a NaN or an infinity reaches its own row alone."""
    ops = rounding(variant)
    linear = ops.pack_quantized([quantize_int4(random(40, 64), 32, search=False)], None)
    x = random(4, 64, seed=1)
    x[0], x[1, 5], x[2, 40] = 1e-38, float("nan"), float("inf")
    y = ops.linear(x, linear)
    assert torch.equal(y[0], torch.zeros(40))
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3:], ops.linear(x[3:], linear))


def test_what_is_not_rounded() -> None:
    """Inputs that are no multiple of 32, groups that cut groups, fp8, and levels already."""
    ops, exact = rounding(VARIANTS[0]), CpuOps(CPU, 1, variant=VARIANTS[0])
    narrow, weight = random(40, 80), random(40, 96)
    for kept in (
        quantize_int8(narrow),
        quantize_int4(weight, 16, search=False),
        quantize_fp8(weight),
    ):
        x = random(3, kept.in_features, seed=1)
        linear = ops.pack_quantized([kept], None)
        assert not rounds(linear)
        assert torch.equal(
            ops.linear(x, linear), exact.linear(x, exact.pack_quantized([kept], None))
        )
    inputs = InputTransform(num_inputs=96, levels="int8", bound=float("inf"))
    assert not rounds(ops.pack_transformed([quantize_int8(weight)], None, inputs))
    assert rounds(ops.pack_quantized([quantize_int8(weight)], None))
    with pytest.raises(ValueError, match="activation_dtype='fp8'"):
        CpuOps(CPU, 1, activation_dtype="fp8")

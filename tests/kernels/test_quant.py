"""Quantized weights: what the numbers mean, how good the quantizers are, and the products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantize import quantize_fp8, quantize_int4, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight, stack

from . import tolerance
from .tolerance import Array

QUANTIZERS: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "int4_g32": lambda w: quantize_int4(w, 32),
    "int4_g128_plain": lambda w: quantize_int4(w, 128, search=False),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def symmetric_int4(rows: int, columns: int, group: int) -> QuantizedWeight:
    """As a checkpoint without zeros brings it."""
    generator = torch.Generator().manual_seed(6)
    return QuantizedWeight(
        kind="int4",
        in_features=columns,
        data=torch.randint(
            0, 256, (rows, -(-columns // 2)), generator=generator, dtype=torch.uint8
        ),
        scales=0.01 + torch.rand(rows, -(-columns // group), generator=generator),
        group_size=group,
    )


def meaning(w: QuantizedWeight) -> Array:
    """Dequantized one element at a time, in float64, from the class's words."""
    out = np.empty((w.data.shape[0], w.in_features))
    data = w.data.float().numpy()
    for o in range(out.shape[0]):
        for i in range(out.shape[1]):
            g = i // w.group_size
            if w.kind == "int4":
                q = int(data[o, i // 2]) >> (4 * (i % 2)) & 15
                zero = 8.0 if w.zeros is None else float(w.zeros[o, g])
            else:
                q, zero = float(data[o, i]), 0.0
            out[o, i] = (q - zero) * float(w.scales[o, g])
    return out


@pytest.mark.parametrize("columns", [1, 31, 64, 100])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_dequantize(kind: str, columns: int) -> None:
    w = QUANTIZERS[kind](randn(5, columns))
    exact = meaning(w)
    low = np.abs(exact) + (0 if w.zeros is None else 32 * float(w.scales.max()))
    tolerance.check(w.dequantize(), exact, 2 * tolerance.U32 * low)
    for start, stop in ((0, columns), (64, columns), (0, 64)):
        if stop <= columns and start < stop and (w.group_size <= 64 or columns < 64):
            part = w.columns(start, stop).rows(1, 4)
            assert torch.equal(part.dequantize(), w.dequantize()[1:4, start:stop])


@pytest.mark.parametrize("columns", [64, 100])
def test_rounding_is_to_the_nearest_level(columns: int) -> None:
    w = randn(9, columns) * torch.logspace(-6, 3, 9)[:, None]
    greatest = w.abs().amax(1, keepdim=True)
    assert ((quantize_int8(w).dequantize() - w).abs() <= greatest / 127 * 0.501).all()
    # e4m3: 3 bits of fraction, and below 2**-6 steps of 2**-9 (of a range that ends at 448).
    limit = torch.maximum(w.abs() * 2**-4, greatest / 448 * 2**-10) * 1.001
    assert ((quantize_fp8(w).dequantize() - w).abs() <= limit).all()
    plain = quantize_int4(w, 20, search=False).dequantize()
    for g in range(0, columns, 20):
        group = w[:, g : g + 20]
        step = (group.amax(1, keepdim=True) - group.amin(1, keepdim=True)) / 15
        assert ((plain[:, g : g + 20] - group).abs() <= 0.501 * step).all()


def test_search_lowers_the_error_it_minimises() -> None:
    w = randn(64, 256) ** 3  # heavy tails
    importance = randn(256, seed=1) ** 4 + 1e-3

    def error(q: QuantizedWeight, share: torch.Tensor) -> float:
        return float(((q.dequantize() - w) ** 2 * share).sum())

    flat = torch.ones(256)
    plain, best = quantize_int4(w, 64, search=False), quantize_int4(w, 64)
    weighted = quantize_int4(w, 64, importance_I=importance)
    assert error(best, flat) < 0.9 * error(plain, flat)
    assert error(weighted, importance) < 0.9 * error(best, importance)


def test_a_matrix_of_sixteen_levels_comes_back() -> None:
    """What another tool rounded to 16 levels a group (GGUF Q4_1) is kept as it is."""
    levels = torch.randint(0, 16, (20, 64)).float()
    levels[:, [0, 32]], levels[:, [1, 33]] = 0, 15
    w = levels * 0.013 - 0.07
    back = quantize_int4(w, 32)
    assert torch.equal(back.levels(), levels)
    torch.testing.assert_close(back.dequantize(), w, rtol=1e-5, atol=1e-6)


def test_half_scales_are_numbers_of_float16_and_cost_nothing() -> None:
    w = randn(64, 256)
    exact, half = quantize_int4(w, 32), quantize_int4(w, 32, half=True)
    assert half.half_scales and half.zeros is not None and not exact.half_scales
    for numbers in (half.scales, half.zeros):
        assert torch.equal(numbers.half().float(), numbers)
    errors = [(q.dequantize() - w).square().mean() for q in (exact, half)]
    assert errors[1] < 1.001 * errors[0]
    assert half.rows(3, 5).half_scales and stack([half, half]).half_scales
    assert not stack([half, exact]).half_scales


def test_scales_too_small_for_float16_stay_float32() -> None:
    w = randn(4, 64) * 1e-6
    kept = quantize_int4(w, 32, half=True)
    assert not kept.half_scales
    assert torch.equal(kept.dequantize(), quantize_int4(w, 32).dequantize())


def test_exact_half_scales_of_a_checkpoint() -> None:
    """Scales in float16 where each of them is a number of float16, as stored otherwise."""
    made = quantize_int4(torch.randn(4, 64), 32, search=False)
    assert made.zeros is not None and made.with_half_scales() is made
    halves = replace(made, scales=made.scales.half().float(), zeros=made.zeros.round())
    assert halves.with_half_scales().half_scales
    assert torch.equal(halves.with_half_scales().dequantize(), halves.dequantize())
    bf16 = replace(halves, scales=made.scales.bfloat16().float(), zeros=None)
    assert bf16.with_half_scales().half_scales
    tiny = replace(bf16, scales=torch.full_like(bf16.scales, 2.0**-30))
    assert not tiny.with_half_scales().half_scales
    assert not quantize_int8(torch.ones(4, 64)).with_half_scales().half_scales


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_degenerate_rows(kind: str) -> None:
    w = torch.zeros(4, 96)
    w[1] = 0.25
    w[2, 5] = 1e30
    w[3] = -1e-20
    back = QUANTIZERS[kind](w)
    assert back.scales.isfinite().all() and (back.zeros is None or back.zeros.isfinite().all())
    torch.testing.assert_close(back.dequantize(), w, rtol=1e-5, atol=1e-12)


def test_wrong_shapes_are_named() -> None:
    w = quantize_int4(randn(4, 64), 32)
    with pytest.raises(ValueError, match="cut a group of 32"):
        w.columns(0, 48)
    with pytest.raises(ValueError, match="differ in kind"):
        stack([w, quantize_int4(randn(4, 64), 16)])
    with pytest.raises(ValueError, match=r"scales must be float32 \[4, 2\]"):
        QuantizedWeight(
            kind="int4", in_features=64, data=w.data, scales=w.scales[:, :1], group_size=32
        )
    with pytest.raises(ValueError, match="at least 1"):
        quantize_int4(randn(4, 64), 0)


def packed(ops: Ops, weights: list[QuantizedWeight], bias: torch.Tensor | None = None) -> Linear:
    try:
        return ops.pack_quantized(weights, bias)
    except NotImplementedError as error:
        pytest.skip(str(error))


def packed_vocab(ops: Ops, weight: QuantizedWeight, first_row: int) -> Vocab:
    try:
        return ops.pack_quantized_vocab(weight, first_row)
    except NotImplementedError as error:
        pytest.skip(str(error))


def bound(x: Array, w: QuantizedWeight) -> Array:
    """x may be rounded to bfloat16; levels and zeros may be summed apart."""
    levels = np.abs(w.levels().double().numpy())
    if w.kind == "int4":
        zeros = np.full(w.scales.shape, 8.0) if w.zeros is None else w.zeros.double().numpy()
        levels += np.abs(np.repeat(zeros, w.group_size, axis=1)[:, : w.in_features])
    scales = np.repeat(w.scales.double().numpy(), w.group_size, axis=1)[:, : w.in_features]
    walk = 2 * np.sqrt(w.in_features) + 4
    apart: Array = walk * tolerance.U32 * (np.abs(x) @ (levels * scales).T)
    return tolerance.product(x, meaning(w), torch.bfloat16) + apart


WEIGHTS: dict[str, Callable[[int, int], QuantizedWeight]] = {
    **{
        name: (lambda rows, columns, f=f: f(randn(rows, columns, seed=rows)))
        for name, f in QUANTIZERS.items()
    },
    "int4_symmetric": lambda rows, columns: symmetric_int4(rows, columns, 32),
}


@pytest.mark.parametrize(
    ("tokens", "columns", "rows"),
    [(1, 64, (33,)), (1, 576, (48, 16, 16)), (5, 97, (40, 1)), (19, 160, (65,)), (40, 256, (64,))],
)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_product(ops: Ops, kind: str, tokens: int, columns: int, rows: tuple[int, ...]) -> None:
    weights = [WEIGHTS[kind](count, columns) for count in rows]
    bias = randn(sum(rows), seed=3)
    linear = packed(ops, weights, bias)
    assert (linear.out_features, linear.in_features) == (sum(rows), columns)
    assert linear.nbytes >= sum(w.nbytes for w in weights)
    x = randn(tokens, columns, seed=4)
    x64 = x.double().numpy()
    expected = np.concatenate([x64 @ meaning(w).T for w in weights], axis=1)
    tol = np.concatenate([bound(x64, w) for w in weights], axis=1)
    got = ops.linear(x, linear)
    assert got.dtype == torch.float32
    tolerance.check(got, expected + bias.double().numpy(), tol + 4 * tolerance.U32)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_vocabulary(ops: Ops, kind: str) -> None:
    table = WEIGHTS[kind](50, 96)
    vocab = packed_vocab(ops, table, 10)
    tokens = torch.tensor([10, 59, 9, 60, 31], dtype=torch.int32)
    expected = meaning(table)[[0, 49, 0, 0, 21]]
    expected[2:4] = 0
    low = 32 * float(table.scales.max()) if table.kind == "int4" else 0.0
    tolerance.check(
        ops.embed(tokens, vocab), expected, 2 * tolerance.U32 * (np.abs(expected) + low)
    )
    x, norm = randn(3, 96, seed=1), 1 + 0.1 * randn(96, seed=2)
    h = ops.rms_norm(x, norm, 1e-5).double().numpy()
    tol = bound(h, table) + 16 * tolerance.U32 * (np.abs(h) @ np.abs(meaning(table)).T)
    tolerance.check(ops.logits(x, norm, 1e-5, vocab), h @ meaning(table).T, tol)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rows_do_not_depend_on_their_neighbours(ops: Ops, kind: str) -> None:
    linear = packed(ops, [WEIGHTS[kind](70, 192)])
    x = randn(35, 192)
    whole = ops.linear(x, linear)
    alone = [1] * 5 + [30] if ops.name == "triton" else [1] * 35  # interpreted, a call is slow
    for cuts in (alone, [2, 16, 17], [32, 3]):
        again = torch.cat([ops.linear(part, linear) for part in x.split(cuts)])
        if ops.name == "reference":
            torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(again, whole)

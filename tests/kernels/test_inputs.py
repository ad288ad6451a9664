"""Products that reorder or round their inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arriero.kernels.input_transform import InputTransform, quantize_rows
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int4
from arriero.kernels.quantized_weight import QuantizedWeight

from .test_quant import bound as weight_bound
from .test_quant import meaning, packed, randn

BOUNDS = [pytest.param(1200.0, id="fbgemm"), pytest.param(math.inf, id="compressed-tensors")]


def by_the_book(
    x: np.ndarray, data: torch.Tensor, scales: np.ndarray, bound: float, bias: np.ndarray
) -> np.ndarray:
    """The formats' definition: rows to float8 by min(max |x|, bound) / 448, then exact sums."""
    f32 = np.float32
    out = np.empty((len(x), len(data)), f32)
    levels = data.double().numpy()
    for t, row in enumerate(x.astype(f32)):
        scale = f32(min(np.abs(row).max(), f32(bound))) / f32(448)
        scale = scale if scale > 0 else f32(1)
        inside = np.clip(row / scale, f32(-448), f32(448))
        q = torch.from_numpy(inside).to(torch.float8_e4m3fn).double().numpy()
        for o in range(len(data)):
            total = f32(math.fsum(q * levels[o]))  # the exact sum, rounded once
            out[t, o] = total * scale * scales[o] + bias[o]
    return out


def rounding(
    ops: Ops, weights: list[QuantizedWeight], bias: torch.Tensor | None, bound: float
) -> Linear:
    packed(ops, weights)  # skips a backend without the kind
    inputs = InputTransform(num_inputs=weights[0].in_features, bound=bound)
    return ops.pack_transformed(weights, bias, inputs)


@pytest.mark.parametrize("bound", BOUNDS)
def test_rounded_inputs(ops: Ops, bound: float) -> None:
    """Bit for bit on the reference; elsewhere within the rounding of a float32 sum."""
    weights = [quantize_fp8(randn(rows, 96, seed=rows)) for rows in (40, 7)]
    bias = randn(47, seed=3)
    linear = rounding(ops, weights, bias, bound)
    x = randn(9, 96, seed=4) * torch.logspace(-3, 4, 9)[:, None]  # some beyond 1200
    x[5] = 0
    data = torch.cat([w.data.view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn)
    scales = torch.cat([w.scales for w in weights])[:, 0].numpy()
    want = by_the_book(x.numpy(), data, scales, bound, bias.numpy())
    got = ops.linear(x, linear)
    assert got.dtype == torch.float32
    if ops.name == "reference":
        assert np.array_equal(got.numpy(), want)
    else:
        size = np.abs(x.numpy()).max(1, keepdims=True) * 96 * np.abs(scales) * 448
        assert (np.abs(got.numpy() - want) <= 1e-6 * size + 1e-6 * np.abs(want)).all()
    alone = torch.cat([ops.linear(row, linear) for row in x.split(1)])
    assert torch.equal(alone, got)


@pytest.mark.parametrize("bound", BOUNDS)
def test_rows_are_rounded_as_defined(ops: Ops, bound: float) -> None:
    x = randn(40, 70, seed=5) * torch.logspace(-30, 30, 40)[:, None]
    x[7] = 0
    x[8] *= torch.logspace(-6, 0, 70)  # levels below the least normal one
    for rows in (x, torch.cat([x, x], 1)[:, 70:]):
        got, want = ops.quantize_rows(rows, bound), quantize_rows(rows, bound)
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(got[1], want[1])


def test_rows_beyond_the_bound_are_cut(ops: Ops) -> None:
    q, scale = ops.quantize_rows(torch.tensor([[2400.0, 600.0, 0.0]]), 1200.0)
    assert scale.item() == pytest.approx(1200 / 448, rel=1e-7)
    assert q.float().tolist() == [[448.0, 224.0, 0.0]]


def test_reordered_inputs(ops: Ops) -> None:
    """GPTQ's act-order: columns sorted by group, with columns of zeros between."""
    columns, inputs = 64, 50
    weight = quantize_int4(randn(33, columns), 16)
    order = torch.randint(0, inputs, (columns,), generator=torch.Generator().manual_seed(1))
    packed(ops, [weight])
    linear = ops.pack_transformed(
        [weight], randn(33, seed=2), InputTransform(num_inputs=inputs, order_I=order)
    )
    assert (linear.in_features, linear.out_features) == (inputs, 33)
    x = randn(5, inputs, seed=3)
    given = x[:, order].double().numpy()
    want = given @ meaning(weight).T + randn(33, seed=2).double().numpy()
    off = np.abs(ops.linear(x, linear).numpy() - want)
    assert (off <= weight_bound(given, weight) + 1e-6).all()


@pytest.mark.parametrize("bound", BOUNDS)
def test_experts_round_their_inputs(ops: Ops, bound: float) -> None:
    experts = [rounding(ops, [quantize_fp8(randn(24, 64, seed=e))], None, bound) for e in range(3)]
    x = randn(8, 64, seed=9) * 300
    got = ops.grouped_linear(x, experts, torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    want = torch.cat([ops.linear(x[:3], experts[0]), ops.linear(x[3:], experts[2])])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))

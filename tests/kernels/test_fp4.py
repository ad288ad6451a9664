"""Products with fp4 weights, and inputs rounded with a static scale or to int8."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from arriero.kernels.input_levels import fp4_levels
from arriero.kernels.input_transform import InputTransform, Levels
from arriero.kernels.ops import Ops
from arriero.kernels.quantize import quantize_fp8, quantize_int8
from arriero.kernels.quantized_weight import QuantizedWeight, stack
from support.modelopt_files import float8_inputs, int8_inputs, nvfp4_inputs

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp4(rows: int, columns: int, seed: int) -> tuple[QuantizedWeight, Tensor]:
    """Random codes and scales, and the matrix that they mean, float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=generator)
    groups = torch.rand(rows, -(-columns // 16), generator=generator) * 400
    groups = groups.to(torch.float8_e4m3fn).float()
    whole = torch.rand(rows, 1, generator=generator) * 1e-3
    values = torch.tensor([*VALUES, *(-value for value in VALUES)]).double()
    spread = groups.double().repeat_interleave(16, 1)[:, :columns]
    weight = QuantizedWeight(
        kind="fp4",
        in_features=columns,
        data=(codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8),
        scales=groups,
        row_scales=whole,
        group_size=16,
    )
    return weight, values[codes] * spread * whole.double()


def close(got: Tensor, want: Tensor) -> None:
    assert float((got - want).abs().max()) <= 2e-6 * float(want.abs().max())


@pytest.mark.parametrize("columns", [16, 72])
def test_products(ops: Ops, columns: int) -> None:
    """Stacked matrices with their own scales; the last group may be shorter."""
    (first, first_OI), (second, second_OI) = fp4(33, columns, 1), fp4(16, columns, 2)
    full_OI = torch.cat([first_OI, second_OI])
    torch.testing.assert_close(
        stack([first, second]).dequantize().double(), full_OI, rtol=2e-7, atol=0
    )
    bias = randn(49, seed=3)
    x = randn(5, columns, seed=4).bfloat16().float()
    linear = ops.pack_quantized([first, second], bias)
    close(ops.linear(x, linear), x.double() @ full_OI.T + bias.double())


def test_products_of_experts(ops: Ops) -> None:
    made = [fp4(24, 32, seed) for seed in range(3)]
    experts = [ops.pack_quantized([weight], None) for weight, _ in made]
    x = randn(8, 32, seed=9).bfloat16().float()
    got = ops.grouped_linear(x, experts, torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    want = torch.cat([x[:3].double() @ made[0][1].T, x[3:].double() @ made[2][1].T])
    close(got, want)


@pytest.mark.parametrize("levels", ["fp8", "int8", "fp4"])
def test_inputs_with_a_static_scale(ops: Ops, levels: Levels) -> None:
    """Of each expert its own scale; numbers beyond the last level are cut."""
    made = [weight_of(levels, seed) for seed in range(2)]
    scales = [torch.tensor([scale]) for scale in SCALES[levels]]
    experts = [
        ops.pack_transformed(
            [weight], None, InputTransform(num_inputs=32, levels=levels, scale=scale)
        )
        for (weight, _), scale in zip(made, scales, strict=True)
    ]
    x = randn(7, 32, seed=5)
    rounds = {"fp8": float8_inputs, "int8": int8_inputs, "fp4": nvfp4_inputs}[levels]
    want = [
        rounds(x.double(), scale.double()) @ full_OI.T
        for (_, full_OI), scale in zip(made, scales, strict=True)
    ]
    close(ops.linear(x, experts[1]), want[1])
    got = ops.grouped_linear(x, experts, torch.tensor([0, 3, 7], dtype=torch.int32))
    close(got, torch.cat([want[0][:3], want[1][3:]]))


SCALES = {"fp8": (2 / 448, 3 / 448), "int8": (2 / 127, 3 / 127), "fp4": (1e-3, 2e-3)}


def weight_of(levels: Levels, seed: int) -> tuple[QuantizedWeight, Tensor]:
    if levels == "fp4":
        return fp4(24, 32, seed)
    quantize = quantize_int8 if levels == "int8" else quantize_fp8
    weight = quantize(randn(24, 32, seed=seed))
    return weight, weight.dequantize().double()


def test_inputs_to_int8_by_row(ops: Ops) -> None:
    weight = quantize_int8(randn(24, 32, seed=1))
    inputs = InputTransform(num_inputs=32, levels="int8", bound=float("inf"))
    linear = ops.pack_transformed([weight], None, inputs)
    x = randn(7, 32, seed=2) * torch.logspace(-3, 3, 7)[:, None]
    x[3] = 0
    rounded = int8_inputs(x.double())
    rounded[3] = 0
    want = rounded @ weight.dequantize().double().T
    for got_O, want_O in zip(ops.linear(x, linear), want, strict=True):
        close(got_O, want_O)


def test_fp4_rounds_to_the_nearest_and_ties_to_the_even_code() -> None:
    middles = [(low + high) / 2 for low, high in pairwise(VALUES)]
    even = [0, 1, 1, 2, 2, 4, 4]
    row = [6.0, *middles, *(-middle for middle in middles), 5.1]
    assert fp4_levels(torch.tensor([row])).tolist() == [
        [6.0, *even, *(-value for value in even), 6.0]
    ]
    tiny = fp4_levels(torch.full((1, 20), 1e-4))  # the scale of the group rounds to 0
    assert not tiny.any() and tiny.shape == (1, 20)


def test_fp4_needs_scales_of_rows() -> None:
    weight, _ = fp4(4, 32, 0)
    with pytest.raises(ValueError, match="fp4 weights have row_scales"):
        QuantizedWeight(
            kind="fp4", in_features=32, data=weight.data, scales=weight.scales, group_size=16
        )
    assert weight.rows(1, 3).row_scales is not None
    assert torch.equal(weight.columns(16, 32).dequantize(), weight.dequantize()[:, 16:])

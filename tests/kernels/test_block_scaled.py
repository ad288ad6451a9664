"""NVFP4 products by torch's block-scaled kernel in the fast mode of the Triton backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arriero.kernels.input_levels import fp4_groups
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.quantized_weight import FP4_VALUES
from arriero.kernels.select import ops_for
from support.scaled_fp4 import block_scaled_product, scaled_mm_v2

from .test_fp4 import fp4
from .test_quant import randn

CPU = torch.device("cpu")
pytest.importorskip("triton", reason="triton is not installed")

from arriero.kernels.triton import block_scaled, triton_ops  # noqa: E402
from arriero.kernels.triton.backend import TritonOps  # noqa: E402
from arriero.kernels.triton.block_scaled import BlockScaled  # noqa: E402
from arriero.kernels.triton.float4 import fp4_rows, tiled_scales  # noqa: E402

SCALE = torch.tensor([2e-3])


@pytest.fixture
def fast() -> Iterator[TritonOps]:
    with block_scaled_product(scaled_mm_v2):
        yield triton_ops(CPU, batch_independent=False)


def rounding(columns: int, scale: Tensor = SCALE) -> InputTransform:
    return InputTransform(num_inputs=columns, levels="fp4", scale=scale)


def defined_rows(x_TI: Tensor, scale: Tensor = SCALE) -> tuple[Tensor, Tensor]:
    """Bytes and tiled scales of rows, by the definition, with the padding written out."""
    rows, columns = x_TI.shape
    number_TGC, scale_TG = fp4_groups(x_TI.float() / scale)
    magnitude = torch.tensor(FP4_VALUES)
    codes = torch.searchsorted(magnitude, number_TGC.abs()) + 8 * number_TGC.signbit()
    codes = torch.nn.functional.pad(codes.flatten(1), (0, -codes[0].numel() % 32))
    bytes_TB = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    tiled = torch.zeros(-(-rows // 128), -(-columns // 64), 32, 4, 4)
    for row in range(rows):
        for group in range(scale_TG.shape[1]):
            within = row % 32, row % 128 // 32, group % 4
            tiled[row // 128, group // 4][within] = scale_TG[row, group]
    return bytes_TB, tiled.flatten().to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (5, 48), (130, 160)])
def test_rows_bit_for_bit(dtype: torch.dtype, rows: int, columns: int) -> None:
    """Numbers of all sizes, groups of zeros and of tiny numbers, numbers beyond the last level."""
    x = randn(rows, columns, seed=rows) * torch.logspace(-5, 1, rows * columns).view(rows, -1)
    x.view(-1, 16)[::3] *= 100
    x[0, :3] = torch.tensor([-0.0, 0.0, torch.inf])
    x = x.to(dtype)
    got = fp4_rows(x, SCALE)
    bytes_TB, scales = defined_rows(x)
    assert torch.equal(got.codes_TB.view(torch.uint8), bytes_TB)
    assert torch.equal(got.scales.view(torch.uint8), scales.view(torch.uint8))


def test_ties_go_to_the_even_code() -> None:
    """All middles between two numbers, and the numbers below and above each middle."""
    values = torch.tensor(FP4_VALUES)
    middles = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    row = torch.cat([middles, *near, values, -middles])[None] * 1.0
    padded = torch.nn.functional.pad(row, (0, -row.shape[1] % 15)).view(-1, 15)
    x = torch.nn.functional.pad(padded, (1, 0), value=6.0)  # so that the scale of a group is 1
    scale = torch.ones(1)
    got = fp4_rows(x.reshape(1, -1), scale)
    bytes_TB, _ = defined_rows(x.reshape(1, -1), scale)
    assert torch.equal(got.codes_TB.view(torch.uint8), bytes_TB)


def test_a_number_that_is_none_spoils_its_group_alone() -> None:
    x = randn(3, 32, seed=1)
    x[1, 5] = torch.nan
    scales = fp4_rows(x, SCALE).scales.float().view(32, 4, 4)
    assert scales[1, 0, 0].isnan() and int(scales.isnan().sum()) == 1


def test_scales_of_weights_are_in_the_same_order() -> None:
    x = randn(130, 160, seed=3)
    _, scale_TG = fp4_groups(x / SCALE)
    got = tiled_scales(scale_TG.to(torch.float8_e4m3fn))
    assert torch.equal(got.view(torch.uint8), fp4_rows(x, SCALE).scales.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["matrix", "stacked"])
@pytest.mark.parametrize("columns", [48, 160])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_products_are_the_references(
    fast: TritonOps, dtype: torch.dtype, stacked: bool, columns: int, bias: bool
) -> None:
    """Stacked matrices have scales of their own; 48 columns are padded to 64."""
    weights = [fp4(rows, columns, rows)[0] for rows in ((144, 16) if stacked else (144,))]
    if not stacked:
        weights = [replace(w, row_scales=torch.full((144, 1), 3e-4)) for w in weights]
    rows = sum(weight.out_features for weight in weights)
    vector = randn(rows, seed=3) if bias else None
    reference = ops_for(CPU, "reference", threads=1)
    x = (randn(9, columns, seed=4) * torch.logspace(-2, 0, 9)[:, None]).to(dtype)
    linear = fast.pack_transformed(weights, vector, rounding(columns))
    assert isinstance(linear.packed, BlockScaled)
    assert linear.packed.factor.shape == (rows if stacked else 1,)
    got = fast.linear(x, linear)
    want = reference.linear(x, reference.pack_transformed(weights, vector, rounding(columns)))
    assert got.dtype == want.dtype == dtype and got.shape == (9, rows)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    assert float((got - want).abs().max()) <= limit * float(want.abs().max())
    assert fast.linear(x[:0], linear).shape == (0, rows)


def test_weights_take_four_bits_and_a_half(fast: TritonOps) -> None:
    weight = fp4(256, 1024, 1)[0]
    weight = replace(weight, row_scales=torch.full((256, 1), 3e-4))
    linear = fast.pack_transformed([weight], None, rounding(1024))
    assert linear.nbytes == 256 * 1024 * 9 // 16 + 3 * 4


def test_experts_and_weights_alone_keep_tritons_product(fast: TritonOps) -> None:
    """And what the kernel does not take: odd numbers of outputs, negative scales, other levels."""
    weight = fp4(32, 64, 1)[0]
    assert isinstance(fast.pack_transformed([weight], None, rounding(64)).packed, BlockScaled)
    exact = triton_ops(CPU, batch_independent=True)
    negative = replace(weight, scales=-weight.scales)
    others = [
        fast.pack_expert([weight], rounding(64)),
        fast.pack_quantized([weight], None),
        exact.pack_transformed([weight], None, rounding(64)),
        fast.pack_transformed([fp4(24, 64, 1)[0]], None, rounding(64)),
        fast.pack_transformed([fp4(32, 72, 1)[0]], None, rounding(72)),
        fast.pack_transformed([negative], None, rounding(64)),
    ]
    assert not any(isinstance(linear.packed, BlockScaled) for linear in others)


def test_grouped_products_of_both_forms(fast: TritonOps) -> None:
    reference = ops_for(CPU, "reference", threads=1)
    weights = [fp4(32, 64, seed)[0] for seed in range(3)]
    inputs = [rounding(64, scale * SCALE) for scale in (1.0, 2.0, 3.0)]
    starts = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    x = randn(7, 64, seed=5)
    each = list(zip(weights, inputs, strict=True))
    theirs = [reference.pack_expert([w], of_inputs) for w, of_inputs in each]
    want = reference.grouped_linear(x, theirs, starts)
    for ours in (
        [fast.pack_expert([w], of_inputs) for w, of_inputs in each],
        [fast.pack_transformed([w], None, of_inputs) for w, of_inputs in each],
    ):
        got = fast.grouped_linear(x, ours, starts)
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("fault", ["absent", "wrong", "older torch"])
def test_an_absent_or_wrong_kernel_is_not_used(
    fast: TritonOps,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def faulty(*args: object, **kwargs: object) -> Tensor:
        if fault == "absent":
            raise RuntimeError("no kernel for this device")
        return 1.1 * scaled_mm_v2(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_scaled_mm_v2", faulty)
    if fault == "older torch":
        monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    weight, x = fp4(32, 64, 1)[0], randn(3, 64, seed=4)
    with caplog.at_level("INFO", logger="arriero"):
        linear = fast.pack_transformed([weight], None, rounding(64))
    assert "torch.nn.functional.scaled_mm" in caplog.text
    assert not isinstance(linear.packed, BlockScaled)
    assert fast.linear(x, linear).shape == (3, 32)


def test_the_cpu_itself_has_no_such_kernel() -> None:
    block_scaled.works_on.cache_clear()
    assert not block_scaled.works_on(CPU)
    block_scaled.works_on.cache_clear()


def test_an_older_gpu_is_not_asked(fast: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch, "_scaled_mm_v2", None)
    assert not block_scaled.works_on(torch.device("cuda"))

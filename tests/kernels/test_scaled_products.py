"""Float8 products by torch's own kernel in the fast mode of the Triton backend."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.quantize import quantize_fp8, quantize_int8
from arriero.kernels.select import ops_for

from .test_quant import randn

CPU = torch.device("cpu")
triton = pytest.importorskip("triton", reason="triton is not installed")

from arriero.kernels.triton import scaled_products, triton_ops  # noqa: E402
from arriero.kernels.triton.backend import TritonOps  # noqa: E402


@pytest.fixture
def fast() -> Iterator[TritonOps]:
    scaled_products.works_on.cache_clear()
    yield triton_ops(CPU, batch_independent=False)
    scaled_products.works_on.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_products_are_the_references(
    fast: TritonOps, dtype: torch.dtype, static: bool, bias: bool
) -> None:
    weights = [quantize_fp8(randn(rows, 96, seed=rows)) for rows in (48, 16)]
    inputs = InputTransform(
        num_inputs=96,
        bound=None if static else math.inf,
        scale=torch.tensor([0.02]) if static else None,
        order_I=torch.randperm(96, generator=torch.Generator().manual_seed(1)),
    )
    vector = randn(64, seed=3) if bias else None
    reference = ops_for(CPU, "reference", threads=1)
    x = (randn(9, 96, seed=4) * torch.logspace(-2, 0, 9)[:, None]).to(dtype)
    linear = fast.pack_transformed(weights, vector, inputs)
    assert fast._scales_in_product(x, linear)
    got = fast.linear(x, linear)
    want = reference.linear(x, reference.pack_transformed(weights, vector, inputs))
    assert got.dtype == want.dtype == dtype and got.shape == (9, 64)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    assert ((got - want).abs().amax() <= limit * want.abs().amax()).all()
    assert fast.linear(x[:0], linear).shape == (0, 64)


def test_what_the_kernel_does_not_take(fast: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(3, 96, seed=4)
    rounding = InputTransform(num_inputs=96, bound=math.inf)
    whole = fast.pack_transformed([quantize_fp8(randn(32, 96, seed=1))], None, rounding)
    assert fast._scales_in_product(x, whole)
    odd = fast.pack_transformed([quantize_fp8(randn(40, 96, seed=1))], None, rounding)
    levels = InputTransform(num_inputs=96, bound=math.inf, levels="int8")
    int8 = fast.pack_transformed([quantize_int8(randn(32, 96, seed=1))], None, levels)
    plain = fast.pack_quantized([quantize_fp8(randn(32, 96, seed=1))], None)
    for linear in (odd, int8, plain):
        assert not fast._scales_in_product(x, linear)
        fast.linear(x, linear)
    exact = triton_ops(CPU, batch_independent=True)
    assert not exact._scales_in_product(x, whole)


@pytest.mark.parametrize("fault", ["absent", "wrong"])
def test_an_absent_or_wrong_kernel_is_not_used(
    fast: TritonOps,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = torch._scaled_mm

    def faulty(*args: object, **kwargs: object) -> torch.Tensor:
        if fault == "absent":
            raise RuntimeError("no kernel for this device")
        return 1.1 * right(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_scaled_mm", faulty)
    rounding = InputTransform(num_inputs=96, bound=math.inf)
    with caplog.at_level("INFO", logger="arriero"):
        linear = fast.pack_transformed([quantize_fp8(randn(32, 96, seed=1))], None, rounding)
    assert "torch._scaled_mm" in caplog.text
    assert not fast._scales_in_product(randn(3, 96, seed=4), linear)

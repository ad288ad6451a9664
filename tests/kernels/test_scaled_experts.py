"""Float8 products of experts by torch's grouped kernel in the fast mode of the Triton backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from arriero.kernels.input_transform import InputTransform
from arriero.kernels.layers import MoELayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8
from arriero.kernels.select import ops_for
from support.scaled_grouped import scaled_grouped_mm

from .test_quant import randn

CPU = torch.device("cpu")
pytest.importorskip("triton", reason="triton is not installed")

from arriero.kernels.triton import scaled_experts, triton_ops  # noqa: E402
from arriero.kernels.triton.backend import TritonOps  # noqa: E402

HIDDEN, MLP, EXPERTS = 64, 32, 5
ROUNDING = InputTransform(num_inputs=HIDDEN, bound=math.inf)
BOUNDED = InputTransform(num_inputs=HIDDEN, bound=900.0)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonOps]:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    scaled_experts.works_on.cache_clear()
    yield triton_ops(CPU, batch_independent=False)
    scaled_experts.works_on.cache_clear()


def pack(ops: Ops, rows: int, columns: int, seed: int, inputs: InputTransform | None) -> Linear:
    weight = quantize_fp8(randn(rows, columns, seed=seed) / columns**0.5)
    if inputs is None:
        return ops.pack_quantized([weight], None)
    return ops.pack_transformed([weight], None, replace(inputs, num_inputs=columns))


def layer(
    ops: Ops, inputs: InputTransform | None, held: range = range(EXPERTS), mlp: int = MLP
) -> MoELayer:
    empty = ops.pack_linear([torch.zeros(1, 1)], None, torch.float32)
    return MoELayer(
        attn_norm_H=torch.ones(1),
        qkv=empty,
        o=empty,
        mlp_norm_H=torch.ones(HIDDEN),
        gate_up=ops.pack_linear([randn(2 * MLP, HIDDEN, seed=1) / 8], None, torch.float32),
        down=ops.pack_linear([randn(HIDDEN, MLP, seed=2) / 6], None, torch.float32),
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=1,
        softmax_scale=1.0,
        eps=1e-5,
        router=ops.pack_linear([randn(EXPERTS, HIDDEN, seed=3)], None, torch.float32),
        experts_gate_up=[pack(ops, 2 * mlp, HIDDEN, 10 + e, inputs) for e in held],
        experts_down=[pack(ops, HIDDEN, mlp, 20 + e, inputs) for e in held],
        first_expert=held.start,
        top_k=2,
    )


def near(got: Tensor, want: Tensor, limit: float) -> bool:
    return bool(((got.float() - want.float()).abs().amax() <= limit * want.abs().amax()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [ROUNDING, BOUNDED], ids=["unbounded", "bounded"])
def test_grouped_products_are_the_references(
    fast: TritonOps, dtype: torch.dtype, inputs: InputTransform
) -> None:
    """Experts with no row, with one, with many; rows of very different size."""
    reference = ops_for(CPU, "reference", threads=1)
    ours, theirs = ([pack(ops, 48, 96, e, inputs) for e in range(5)] for ops in (fast, reference))
    starts_E1 = torch.tensor([0, 0, 1, 20, 20, 27], dtype=torch.int32)
    x = (randn(27, 96, seed=9) * torch.logspace(-2, 0, 27)[:, None]).to(dtype)
    assert fast._scales_in_experts(x, ours)
    got = fast.grouped_linear(x, ours, starts_E1)
    want = reference.grouped_linear(x, theirs, starts_E1)
    assert got.dtype == want.dtype == dtype and got.shape == (27, 48)
    assert near(got, want, 2**-7)  # the product gives bfloat16
    none = fast.grouped_linear(x[:0], ours, torch.zeros(6, dtype=torch.int32))
    assert none.shape == (0, 48)


@pytest.mark.parametrize("held", [range(EXPERTS), range(2, 4)], ids=["all", "a slice"])
def test_a_layer_is_the_references(fast: TritonOps, held: range) -> None:
    """Rows gathered, scored and rounded in a launch; pairs of other ranks' experts are left out."""
    reference = ops_for(CPU, "reference", threads=1)
    ours, theirs = (layer(ops, BOUNDED, held) for ops in (fast, reference))
    x = randn(19, HIDDEN, seed=5)
    assert near(fast.moe_block(x, ours), reference.moe_block(x, theirs), 2**-6)
    assert fast._table(ours.experts_gate_up).stack is not None


def test_experts_lie_in_one_memory(fast: TritonOps) -> None:
    """No weight is there twice, and other experts come to the same addresses."""
    old, other = layer(fast, ROUNDING), layer(fast, ROUNDING)
    table = fast._table(old.experts_gate_up)
    assert table.stack is not None and table.data is not None
    address = table.data.data_ptr()
    parts = table.stack.data_EOI.unbind()
    for expert, part in zip(old.experts_gate_up, parts, strict=True):
        assert expert.packed.data.data_ptr() == part.data_ptr()
    order = [3, 0, 2, 2, 1]
    mixed = [old.experts_gate_up[e] for e in order[:4]] + [other.experts_gate_up[4]]
    wanted = [linear.packed.data.float().clone() for linear in mixed]
    scales = [linear.packed.scales.clone() for linear in mixed]
    new = replace(old, experts_gate_up=mixed)
    fast.replace_experts(old, new)
    assert fast._table(new.experts_gate_up) is table and table.data.data_ptr() == address
    for e, weight in enumerate(wanted):
        assert torch.equal(table.stack.data_EOI[e].float(), weight), e
        assert torch.equal(table.stack.scales_EO[e], scales[e][:, 0]), e
        assert torch.equal(mixed[e].packed.data.float(), weight), e
    assert table.data.tolist() == [linear.packed.data.data_ptr() for linear in mixed]


def test_what_the_kernel_does_not_take(fast: TritonOps) -> None:
    static = InputTransform(num_inputs=HIDDEN, scale=torch.tensor([0.02]))
    sorted_ = InputTransform(num_inputs=HIDDEN, bound=math.inf, order_I=torch.arange(HIDDEN))
    x = randn(3, HIDDEN, seed=4)
    assert fast._scales_in_experts(x, layer(fast, ROUNDING).experts_gate_up)
    for inputs in (static, sorted_, None):
        assert not fast._scales_in_experts(x, layer(fast, inputs).experts_gate_up)
    assert not fast._scales_in_experts(x, layer(fast, ROUNDING, mlp=20).experts_gate_up)
    exact = triton_ops(CPU, batch_independent=True)
    assert not exact._scales_in_experts(x, layer(exact, ROUNDING).experts_gate_up)


@pytest.mark.parametrize("fault", ["absent", "wrong"])
def test_an_absent_or_wrong_kernel_is_not_used(
    fast: TritonOps,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def faulty(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if fault == "absent":
            raise RuntimeError("no kernel for this device")
        return 1.1 * scaled_grouped_mm(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_scaled_grouped_mm", faulty)
    x = randn(3, HIDDEN, seed=4)
    with caplog.at_level("INFO", logger="arriero"):
        assert not fast._scales_in_experts(x, layer(fast, ROUNDING).experts_gate_up)
    assert "torch._scaled_grouped_mm" in caplog.text

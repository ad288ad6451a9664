"""Norm and SwiGLU that write float8 rows: the bits of separate launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from arriero.kernels import adapted, input_transform
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear
from arriero.kernels.quantize import quantize_fp8, quantize_int8
from arriero.kernels.rounded_rows import RoundedRows, rounding_of, unrounded
from arriero.kernels.select import ops_for

from . import paged
from .test_quant import randn

CPU = torch.device("cpu")
pytest.importorskip("triton", reason="triton is not installed")

from arriero.kernels.triton import scaled_products, triton_ops  # noqa: E402
from arriero.kernels.triton.activation import silu_mul, silu_mul_rounded  # noqa: E402
from arriero.kernels.triton.backend import TritonOps  # noqa: E402
from arriero.kernels.triton.norm import add_rms_norm, norm_rows, rms_norm  # noqa: E402

EPS = 1e-5
STATIC = torch.tensor([0.013])
FORMS = {
    "dynamic": InputTransform(num_inputs=1, bound=math.inf),
    "bounded": InputTransform(num_inputs=1, bound=2.0),
    "static": InputTransform(num_inputs=1, scale=STATIC),
}


@pytest.fixture(params=FORMS)
def inputs(request: pytest.FixtureRequest) -> InputTransform:
    return FORMS[request.param]


def of(inputs: InputTransform) -> Linear:
    """Weights of a product with such inputs."""
    return Linear(out_features=1, in_features=1, packed=None, bias=None, nbytes=0, inputs=inputs)


def rows_of(num_rows: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of very different size, and the second one of zeros."""
    x = randn(num_rows, size, seed=seed) * torch.logspace(-3, 1, num_rows)[:, None]
    x[1:2] = 0
    return x.to(dtype)


def check_bits(got: object, separate: Tensor, inputs: InputTransform) -> None:
    """The levels and scales of separate launches for the same rows."""
    assert isinstance(got, RoundedRows) and got.dtype == separate.dtype
    q_TI, scale = input_transform.float8_rows(triton_ops(CPU), separate, inputs)
    assert torch.equal(got.levels_TI.view(torch.uint8), q_TI.view(torch.uint8))
    assert got.scale_T1.shape == (len(separate), 1)
    assert torch.equal(got.scale_T1, scale.expand(len(separate), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16384), (3, 16384), (9, 70), (4, 64)], ids=str)
def test_a_norm_rounds_its_rows(
    inputs: InputTransform, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Alone and after the residual sum; the unrounded rows too, where they are kept."""
    x, part, weight = rows_of(*shape, dtype), rows_of(*shape, dtype, 1), randn(shape[1], seed=2)
    for keeps in (False, True):
        rounding = rounding_of(of(inputs), keeps_rows=keeps)
        alone = norm_rows(x, None, weight, EPS, rounding)
        check_bits(alone, rms_norm(x, weight, EPS), inputs)
        total, expected_total = x.clone(), x.clone()
        added = norm_rows(total, part, weight, EPS, rounding)
        expected = add_rms_norm(expected_total, part, weight, EPS)
        check_bits(added, expected, inputs)
        assert torch.equal(total, expected_total), "the residual stream is the sum"
        assert isinstance(added, RoundedRows)
        if keeps:
            assert torch.equal(unrounded(added), expected)
        else:
            assert added.rows_TI is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 6656), (3, 6656), (2, 14336), (9, 70)], ids=str)
def test_swiglu_rounds_its_rows(
    inputs: InputTransform, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    gate_up = rows_of(shape[0], 2 * shape[1], dtype)
    rounding = rounding_of(of(inputs))
    assert rounding is not None
    check_bits(silu_mul_rounded(gate_up, rounding), silu_mul(gate_up), inputs)
    wide = torch.cat([gate_up, gate_up[:, :3]], 1)[:, : gate_up.shape[1]]  # a view with a stride
    check_bits(silu_mul_rounded(wide, rounding), silu_mul(gate_up), inputs)


def test_swiglu_leaves_the_rows_behind_the_experts(inputs: InputTransform) -> None:
    """Only the device knows the number of rows of all experts."""
    gate_up, starts_E1 = rows_of(40, 2 * 64, torch.float32), torch.tensor([0, 0, 7, 33])
    gate_up[33:] = math.nan
    rounding = rounding_of(of(inputs))
    assert rounding is not None
    got = silu_mul_rounded(gate_up, rounding, starts_E1.int())
    whole = RoundedRows(
        levels_TI=got.levels_TI[:33], scale_T1=got.scale_T1[:33], dtype=torch.float32
    )
    check_bits(whole, silu_mul(gate_up[:33]), inputs)


def test_no_rows(inputs: InputTransform) -> None:
    rounding = rounding_of(of(inputs))
    assert rounding is not None
    for rows in (
        norm_rows(torch.empty(0, 64), None, torch.ones(64), EPS, rounding),
        silu_mul_rounded(torch.empty(0, 128), rounding),
    ):
        check_bits(rows, torch.empty(0, 64), inputs)


def test_which_products_take_rounded_rows() -> None:
    """Those with float8 inputs in the order of the rows; all others round by themselves."""
    assert rounding_of(of(FORMS["bounded"])) is not None
    sorted_ = InputTransform(num_inputs=4, bound=math.inf, order_I=torch.arange(4))
    levels = InputTransform(num_inputs=4, bound=math.inf, levels="int8")
    order = InputTransform(num_inputs=4, order_I=torch.arange(4))
    for inputs in (sorted_, levels, order):
        assert rounding_of(of(inputs)) is None
    ops = ops_for(CPU, "reference", threads=1)
    assert rounding_of(ops.pack_linear([randn(8, 4)], None, torch.float32)) is None


HIDDEN, MLP = 64, 48


def layer_of(ops: Ops, inputs: InputTransform | None) -> DenseLayer:
    """A layer with float8 products; of int8 weights with plain inputs for None."""

    def pack(rows: int, columns: int, seed: int) -> Linear:
        w = randn(rows, columns, seed=seed) / columns**0.5
        if inputs is None:
            return ops.pack_quantized([quantize_int8(w)], None)
        form = InputTransform(num_inputs=columns, bound=inputs.bound, scale=inputs.scale)
        return ops.pack_transformed([quantize_fp8(w)], randn(rows, seed=seed + 1), form)

    return DenseLayer(
        attn_norm_H=randn(HIDDEN, seed=1),
        qkv=pack(64 + 2 * 16, HIDDEN, 2),
        o=pack(HIDDEN, 64, 4),
        mlp_norm_H=randn(HIDDEN, seed=6),
        gate_up=pack(2 * MLP, HIDDEN, 7),
        down=pack(HIDDEN, MLP, 9),
        num_q_heads=4,
        num_kv_heads=1,
        head_dim=16,
        softmax_scale=0.25,
        eps=EPS,
    )


@pytest.fixture(params=[False, True], ids=["scaled in the product", "widened"])
def ops(request: pytest.FixtureRequest) -> Iterator[TritonOps]:
    scaled_products.works_on.cache_clear()
    yield triton_ops(CPU, batch_independent=request.param)
    scaled_products.works_on.cache_clear()


def run_decoder(ops: TritonOps, decoder: Callable[..., Callable[..., Tensor]]) -> Tensor:
    """Two layers over a prompt and a decode."""
    layers = [layer_of(ops, inputs) for inputs in (*FORMS.values(), None)]
    case = paged.Case(4, 1, 16, [(0, 3), (5, 1)])
    kv = ops.kv_cache(paged.spec(case, torch.float32, layers=len(layers)), CPU)
    blocks = paged.tables(case, kv.spec.num_blocks)
    batch = paged.batch(case.sequences, blocks, 16)
    return decoder(layers, kv, None)(rows_of(4, HIDDEN, torch.float32), batch)


def test_a_decoder_has_the_bits_of_separate_ops(ops: TritonOps) -> None:
    """All forms of rounding, and a layer of plain inputs after one that rounds."""

    def separate(*arguments: object) -> Callable[..., Tensor]:
        return Ops.decoder(Separate(ops), *arguments)  # type: ignore[arg-type]

    assert torch.equal(run_decoder(ops, ops.decoder), run_decoder(ops, separate))


class Separate:
    """The ops of a backend, in the blocks that `Ops` makes of them."""

    attention_block, mlp_block, moe_block = Ops.attention_block, Ops.mlp_block, Ops.moe_block

    def __init__(self, ops: TritonOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> object:
        return getattr(self._ops, name)


def test_an_mlp_has_the_bits_of_separate_ops(ops: TritonOps, inputs: InputTransform) -> None:
    layer = layer_of(ops, inputs)
    x = rows_of(5, HIDDEN, torch.float32)
    h = ops.rms_norm(x, layer.mlp_norm_H, EPS)
    expected = adapted.gated_mlp(ops, h, layer)
    rows = ops.mlp_rows(x, layer)
    assert isinstance(rows, RoundedRows)
    assert torch.equal(ops.gated_mlp(rows, layer), expected)
    assert torch.equal(ops.gated_mlp(h, layer), expected)
    assert torch.equal(ops.mlp_block(x, layer), expected)
    plain = layer_of(ops, None)
    assert isinstance(ops.mlp_rows(x, plain), Tensor)

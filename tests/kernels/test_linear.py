"""Products, norms, embedding and head against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arriero.kernels.ops import Ops

from . import tolerance

# (tokens, in, outs): one token, odd sizes, TP-uneven slices, one element, more than a tile.
SHAPES = [
    (1, 576, (576, 192, 192)),
    (3, 64, (65,)),
    (7, 97, (31, 1)),
    (17, 192, (320, 320)),
    (33, 513, (129,)),
    (70, 128, (257,)),
    (1, 1, (1,)),
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_linear(
    ops: Ops, dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...]], biased: bool
) -> None:
    tokens, inner, outs = shape
    weights = [randn(out, inner, seed=i) for i, out in enumerate(outs)]
    bias = randn(sum(outs), seed=9) if biased else None
    packed = ops.pack_linear(weights, bias, dtype)
    assert (packed.out_features, packed.in_features) == (sum(outs), inner)
    assert packed.nbytes >= sum(outs) * inner * dtype.itemsize
    x = randn(tokens, inner, seed=8)
    y = ops.linear(x, packed)
    w64 = torch.cat(weights).to(dtype).double().numpy()
    x64 = x.double().numpy()
    expected = x64 @ w64.T + (0 if bias is None else bias.double().numpy())
    assert y.dtype == torch.float32
    tolerance.check(y, expected, tolerance.product(x64, w64, dtype) + 4 * tolerance.U32)


def test_linear_takes_strided_views(ops: Ops, dtype: torch.dtype) -> None:
    wide = randn(9, 200)
    x = wide[::2, 10:138]
    weights = [randn(128, 40, seed=1).t(), randn(80, 256, seed=2)[::2, ::2]]
    plain = ops.pack_linear([w.contiguous() for w in weights], None, dtype)
    viewed = ops.pack_linear(weights, None, dtype)
    assert torch.equal(ops.linear(x, viewed), ops.linear(x.contiguous(), plain))


def test_linear_keeps_its_inputs(ops: Ops) -> None:
    weight, x = randn(24, 40), randn(5, 40, seed=1)
    packed = ops.pack_linear([weight], None, torch.float32)
    before = x.clone()
    y = ops.linear(x, packed)
    weight.fill_(torch.nan)
    assert torch.equal(ops.linear(x, packed), y)
    assert torch.equal(x, before)


def test_linear_with_large_and_tiny_values(ops: Ops, dtype: torch.dtype) -> None:
    """Terms that cancel: the sum must be as good as its terms allow."""
    x = torch.cat([randn(4, 96) * 100, randn(4, 96, seed=1) * 1e-3], dim=1)
    weight = randn(33, 192, seed=2)
    weight[:, 96:] *= 1e-2
    w64 = weight.to(dtype).double().numpy()
    x64 = x.double().numpy()
    y = ops.linear(x, ops.pack_linear([weight], None, dtype))
    tolerance.check(y, x64 @ w64.T, tolerance.product(x64, w64, dtype))


@pytest.mark.parametrize("hidden", [1, 63, 64, 576, 4100])
def test_rms_norm(ops: Ops, hidden: int) -> None:
    x = randn(5, hidden) * torch.tensor([1e-4, 1, 30, 1e3, 0])[:, None]
    weight = randn(hidden, seed=1)
    for view in (x, randn(5, hidden + 7).t().contiguous().t()[:, 3 : 3 + hidden].copy_(x)):
        x64 = view.double().numpy()
        norm = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5)
        expected = norm * weight.double().numpy()
        # The mean of squares carries a random walk of sqrt(H) roundings, halved by the root.
        tol = (4 + np.sqrt(hidden)) * tolerance.U32 * np.abs(expected)
        tolerance.check(ops.rms_norm(view, weight, 1e-5), expected, tol)


@pytest.mark.parametrize("size", [1, 5, 64, 1537])
def test_silu_mul(ops: Ops, size: int) -> None:
    gate_up = randn(3, 2 * size) * 4
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = -200.0, 200.0, 0.0
    g, u = np.split(gate_up.double().numpy(), 2, axis=1)
    expected = g / (1 + np.exp(-g)) * u
    # exp(x) of a float32 x keeps |x| units, since x itself is exact here: 4 + a few is generous.
    tolerance.check(ops.silu_mul(gate_up), expected, 8 * tolerance.U32 * np.abs(expected) + 1e-37)


@pytest.mark.parametrize(("first", "rows"), [(0, 100), (37, 31), (99, 1)])
def test_embed(ops: Ops, dtype: torch.dtype, first: int, rows: int) -> None:
    table = randn(100, 72)
    vocab = ops.pack_vocab(table[first : first + rows], first, dtype)
    assert (vocab.first_row, vocab.num_rows, vocab.hidden_size) == (first, rows, 72)
    tokens = torch.tensor([0, 99, first, first + rows - 1, 50, 36, 37, 68, 99], dtype=torch.int32)
    expected = table.to(dtype).float()[tokens.long()]
    held = (tokens >= first) & (tokens < first + rows)
    assert torch.equal(ops.embed(tokens, vocab), expected * held[:, None])


@pytest.mark.parametrize("rows", [1, 2, 19])
def test_logits(ops: Ops, dtype: torch.dtype, rows: int) -> None:
    table, norm, x = randn(131, 80), 1 + 0.1 * randn(80, seed=1), randn(rows, 80, seed=2) * 5
    got = ops.logits(x, norm, 1e-6, ops.pack_vocab(table, 17, dtype))
    x64 = x.double().numpy()
    h64 = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * norm.double().numpy()
    w64 = table.to(dtype).double().numpy()
    slack = 13 * tolerance.U32 * (np.abs(h64) @ np.abs(w64).T)
    assert got.dtype == torch.float32
    tolerance.check(got, h64 @ w64.T, tolerance.product(h64, w64, dtype) + slack)


def test_rows_do_not_depend_on_their_neighbours(ops: Ops, dtype: torch.dtype) -> None:
    """Bit for bit; the reference to rounding, since torch picks its product by batch size."""
    x = randn(67, 576)
    linear = ops.pack_linear([randn(576, 576, seed=1) / 24, randn(67, 576, seed=2)], None, dtype)
    vocab = ops.pack_vocab(randn(203, 576, seed=3), 0, dtype)
    norm = randn(576, seed=4)
    for run in (
        lambda part: ops.linear(part, linear),
        lambda part: ops.logits(part, norm, 1e-5, vocab),
        lambda part: ops.rms_norm(part, norm, 1e-5),
        ops.silu_mul,
    ):
        whole = run(x)
        alone = [1] * 5 + [62] if ops.name == "triton" else [1] * 67  # interpreted, a call is slow
        for cuts in (alone, [2, 3, 5, 7, 50], [16, 48, 3], [66, 1]):
            again = torch.cat([run(part) for part in x.split(cuts)])
            if ops.name == "reference":
                torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(again, whole)


def test_products_do_not_depend_on_threads(
    ops_by_threads: tuple[Ops, Ops], dtype: torch.dtype
) -> None:
    x = randn(37, 640)
    results = []
    for ops in ops_by_threads:
        linear = ops.pack_linear([randn(515, 640, seed=1)], None, dtype)
        results.append([ops.linear(x[:n], linear) for n in (1, 8, 37)])
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)

"""Whole blocks and the decoder loop against a float64 model written here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops

from . import paged, tolerance
from .paged import Case
from .tolerance import Array

HIDDEN, MLP, SCALE, EPS = 72, 100, 0.125, 1e-5
CASE = Case(6, 2, 20, [(0, 9), (0, 1), (0, 14)])


@dataclass(frozen=True)
class Weights:
    """One layer in float64, already rounded to the dtype it is packed in."""

    norms: tuple[Array, Array]
    q: Array
    k: Array
    v: Array
    o: Array
    gate: Array
    up: Array
    down: Array


def weights(dtype: torch.dtype, seed: int) -> Weights:
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        w = torch.tensor(rng.normal(size=(rows, columns)) / columns**0.5)
        return w.to(dtype).double().numpy()

    def norm() -> Array:
        return torch.tensor(1 + 0.2 * rng.normal(size=HIDDEN)).float().double().numpy()

    q, kv = CASE.q_heads * CASE.head_dim, CASE.kv_heads * CASE.head_dim
    return Weights(
        norms=(norm(), norm()),
        q=matrix(q, HIDDEN),
        k=matrix(kv, HIDDEN),
        v=matrix(kv, HIDDEN),
        o=matrix(HIDDEN, q),
        gate=matrix(MLP, HIDDEN),
        up=matrix(MLP, HIDDEN),
        down=matrix(HIDDEN, MLP),
    )


def pack(ops: Ops, w: Weights, dtype: torch.dtype) -> DenseLayer:
    def tensors(*arrays: Array) -> list[torch.Tensor]:
        return [torch.tensor(a, dtype=torch.float32) for a in arrays]

    attn_norm, mlp_norm = tensors(*w.norms)
    return DenseLayer(
        attn_norm_H=attn_norm,
        qkv=ops.pack_linear(tensors(w.q, w.k, w.v), None, dtype),
        o=ops.pack_linear(tensors(w.o), None, dtype),
        mlp_norm_H=mlp_norm,
        gate_up=ops.pack_linear(tensors(w.gate, w.up), None, dtype),
        down=ops.pack_linear(tensors(w.down), None, dtype),
        num_q_heads=CASE.q_heads,
        num_kv_heads=CASE.kv_heads,
        head_dim=CASE.head_dim,
        softmax_scale=SCALE,
        eps=EPS,
    )


def rms(x: Array, weight: Array) -> Array:
    normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
    return normed


def attention64(w: Weights, x: Array, batch: FlatBatch) -> Array:
    """Every sequence starts at position 0, so its keys are those of the batch."""
    h = rms(x, w.norms[0])
    cos, sin = batch.cos_TD.double().numpy(), batch.sin_TD.double().numpy()
    q, k, v = ((h @ m.T).reshape(len(x), -1, CASE.head_dim) for m in (w.q, w.k, w.v))
    q, k = paged.rotate(q, cos, sin), paged.rotate(k, cos, sin)
    starts = batch.query_start_S1.tolist()
    parts = []
    for s in range(len(starts) - 1):
        own = slice(starts[s], starts[s + 1])
        position = np.arange(starts[s + 1] - starts[s])
        parts.append(paged.attend(q[own], position, k[own], v[own], SCALE, 0.0)[0])
    out: Array = np.concatenate(parts).reshape(len(x), -1) @ w.o.T
    return out


def mlp64(w: Weights, x: Array) -> Array:
    h = rms(x, w.norms[1])
    gate = h @ w.gate.T
    out: Array = (gate / (1 + np.exp(-gate)) * (h @ w.up.T)) @ w.down.T
    return out


def budget(dtype: torch.dtype, products: int) -> float:
    """Share of the output's size: products in a row, each a random walk of rounded inputs.

    With weights of variance 1/columns a product keeps the relative error of its input and adds
    about one unit of its own; SIGMAS of them, added up rather than in squares.
    """
    return tolerance.SIGMAS * products * (tolerance.UNIT[dtype] + 8 * tolerance.U32)


def start(ops: Ops, dtype: torch.dtype) -> tuple[torch.Tensor, FlatBatch, list[list[int]]]:
    blocks = paged.tables(CASE, paged.spec(CASE, dtype).num_blocks)
    batch = paged.batch(CASE.sequences, blocks, CASE.head_dim)
    x = torch.randn(len(batch.positions_T), HIDDEN, generator=torch.Generator().manual_seed(5))
    return x, batch, blocks


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_block(ops: Ops, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    w = weights(dtype, 0)
    x, batch, _ = start(ops, dtype)
    kv = paged.poisoned_cache(ops, paged.spec(CASE, kv_dtype))
    before = x.clone()
    got = ops.attention_block(x, pack(ops, w, dtype), kv, 1, batch)
    expected = attention64(w, x.double().numpy(), batch)
    assert torch.equal(x, before), "a block returns a partial; the caller adds it"
    coarse = max(dtype, kv_dtype, key=tolerance.UNIT.__getitem__)
    tolerance.check(got, expected, budget(coarse, 5) * np.abs(expected).max())


def test_mlp_block(ops: Ops, dtype: torch.dtype) -> None:
    w = weights(dtype, 0)
    x, _, _ = start(ops, dtype)
    got = ops.mlp_block(x, pack(ops, w, dtype))
    expected = mlp64(w, x.double().numpy())
    tolerance.check(got, expected, budget(dtype, 3) * np.abs(expected).max())


@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "sliced"])
def test_decoder(ops: Ops, dtype: torch.dtype, reduced: bool) -> None:
    """Three layers; with a `reduce` that stands for a second slice holding the same weights."""
    stack = [weights(dtype, seed) for seed in range(3)]
    x, batch, _ = start(ops, dtype)
    kv = paged.poisoned_cache(ops, paged.spec(CASE, dtype, layers=3))
    factor = 2.0 if reduced else 1.0
    run = ops.decoder(
        [pack(ops, w, dtype) for w in stack], kv, (lambda part: part * 2) if reduced else None
    )
    expected = x.double().numpy()
    for w in stack:
        expected = expected + factor * attention64(w, expected, batch)
        expected = expected + factor * mlp64(w, expected)
    tolerance.check(run(x, batch), expected, budget(dtype, 24) * np.abs(expected).max())


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoder_gives_the_same_bits_however_prompts_are_cut(
    ops: Ops, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    layers = [pack(ops, weights(dtype, seed), dtype) for seed in range(2)]
    x, batch, blocks = start(ops, dtype)
    starts = batch.query_start_S1.tolist()

    def outcome(steps: list[list[tuple[int, int, int]]]) -> torch.Tensor:
        """Each step is a list of (sequence, first token, last token + 1)."""
        kv = paged.poisoned_cache(ops, paged.spec(CASE, kv_dtype))
        run = ops.decoder(layers, kv, None)
        out = torch.full_like(x, torch.nan)
        for step in steps:
            part = paged.batch(
                [(first, stop - first) for _, first, stop in step],
                [blocks[s] for s, _, _ in step],
                CASE.head_dim,
            )
            tokens = torch.cat([torch.arange(starts[s] + a, starts[s] + b) for s, a, b in step])
            out[tokens] = run(x[tokens], part)
        return out

    whole = outcome([[(0, 0, 9), (1, 0, 1), (2, 0, 14)]])
    small = [[(0, i, i + 1)] for i in range(9)] + [[(2, i, i + 2)] for i in range(0, 14, 2)]
    if ops.name == "triton":  # interpreted, a step is slow
        small = [[(0, 0, 1)], [(0, 1, 2)], [(0, 2, 9)], [(2, 0, 12)], [(2, 12, 14)]]
    for steps in (
        [[(0, 0, 9)], [(1, 0, 1)], [(2, 0, 14)]],
        [[(2, 0, 5), (0, 0, 3)], [(0, 3, 4), (2, 5, 6), (1, 0, 1)], [(2, 6, 14), (0, 4, 9)]],
        [*small, [(1, 0, 1)]],
    ):
        again = outcome(steps)
        if ops.name == "reference":
            # A bfloat16 input may fall on the other side of a rounding boundary.
            limit = 1e-5 if dtype == kv_dtype == torch.float32 else budget(torch.bfloat16, 8)
            assert (again - whole).abs().max() <= limit * whole.abs().max()
        else:
            assert torch.equal(again, whole)

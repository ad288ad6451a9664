"""The int8 cache: its numbers, its canonical bytes, and attention over what it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arriero.kernels.kv_cache import KVCache
from arriero.kernels.ops import Ops

from . import paged, tolerance
from .paged import BLOCK, CASES, Case
from .test_attention import layer_of, queries
from .tolerance import Array


def cache(ops: Ops, case: Case) -> KVCache:
    """An int8 cache, every unused slot of which dequantizes to NaN."""
    of = paged.spec(case, torch.int8)
    try:
        kv = ops.kv_cache(of, torch.device("cpu"))
    except NotImplementedError as error:
        pytest.skip(str(error))
    poison = torch.full((of.num_blocks, 2, of.num_kv_heads, BLOCK, 1), torch.nan)
    levels = torch.full((*poison.shape[:-1], of.head_dim), 99, dtype=torch.int8)
    for layer in range(of.num_layers):
        kv.write(layer, range(of.num_blocks), torch.cat([levels, poison.view(torch.int8)], -1))
    return kv


def write_tokens(ops: Ops, case: Case, kv: KVCache, blocks: list[list[int]]) -> Array:
    """Each sequence's whole context through `rope_write_kv`; returns qkv in float64."""
    batch = paged.batch([(0, sum(sizes)) for sizes in case.sequences], blocks, case.head_dim)
    tokens = batch.positions_T.shape[0]
    heads = case.q_heads + 2 * case.kv_heads
    qkv = torch.randn(tokens, heads * case.head_dim, generator=torch.Generator().manual_seed(7))
    qkv *= torch.logspace(-3, 2, tokens)[:, None]
    qkv[0] = 0
    ops.rope_write_kv(qkv, layer_of(ops, case), kv, 1, batch)
    return qkv.double().numpy().reshape(tokens, heads, case.head_dim)


def dequantized(kv: KVCache, table: list[int], count: int) -> tuple[Array, Array]:
    """A sequence's keys and values [count, K, D] by the meaning of the canonical bytes."""
    data = kv.read(1, table).numpy()
    assert data.dtype == np.int8 and data.shape[-1] == kv.spec.canonical_dim
    scales = np.ascontiguousarray(data[..., -4:]).view("<f4").astype(np.float64)
    values = data[..., :-4].astype(np.float64) * scales
    flat = values.transpose(0, 3, 1, 2, 4).reshape(-1, 2, *values.shape[2:3], values.shape[4])
    return flat[:count, 0], flat[:count, 1]


def test_round_trip(ops: Ops) -> None:
    case = Case(2, 2, 18, [(0, 12)])
    kv = cache(ops, case)
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 2, BLOCK, kv.spec.canonical_dim)
    data = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    kv.write(1, [4, 0, 2], data)
    assert torch.equal(kv.read(1, [2, 4]), data[[2, 0]])
    elements = 2 * 2 * kv.spec.num_blocks * 2 * BLOCK
    assert kv.nbytes >= elements * 22


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_stored_values(ops: Ops, case: Case) -> None:
    kv = cache(ops, case)
    blocks = paged.tables(case, kv.spec.num_blocks)
    qkv = write_tokens(ops, case, kv, blocks)
    whole = paged.batch([(0, sum(s)) for s in case.sequences], blocks, case.head_dim)
    cos, sin = whole.cos_TD.double().numpy(), whole.sin_TD.double().numpy()
    k64 = paged.rotate(qkv[:, case.q_heads : -case.kv_heads], cos, sin)
    start = 0
    for sizes, table in zip(case.sequences, blocks, strict=True):
        stop = start + sum(sizes)
        for got, exact in zip(
            dequantized(kv, table, stop - start),
            (k64[start:stop], qkv[start:stop, -case.kv_heads :]),
            strict=True,
        ):
            # Half a level of the head's greatest magnitude, and float32 on the way there.
            limit = (0.5 / 127 + 16 * tolerance.U32) * np.abs(exact).max(-1, keepdims=True)
            tolerance.check(torch.tensor(got), exact, limit)
        start = stop


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(ops: Ops, case: Case) -> None:
    kv = cache(ops, case)
    blocks = paged.tables(case, kv.spec.num_blocks)
    write_tokens(ops, case, kv, blocks)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    out = ops.paged_attention(q, 0.02, kv, 1, batch).view(q.shape)
    starts = batch.query_start_S1.tolist()
    for s, table in enumerate(blocks):
        own = slice(starts[s], starts[s + 1])
        k, v = dequantized(kv, table, sum(case.sequences[s]))
        position = batch.positions_T[own].double().numpy()
        expected, tol = paged.attend(
            q[own].double().numpy(), position, k, v, 0.02, tolerance.UNIT[torch.bfloat16]
        )
        tolerance.check(out[own], expected, tol)

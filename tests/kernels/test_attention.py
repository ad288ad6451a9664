"""RoPE, the paged cache and attention against float64, in caches poisoned with NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops

from . import paged, tolerance
from .paged import BLOCK, CASES, Case


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["kv_float32", "kv_bfloat16"])
def kv_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def layer_of(ops: Ops, case: Case) -> DenseLayer:
    """Only the geometry matters to the ops under test here."""
    empty = ops.pack_linear([torch.zeros(1, 1)], None, torch.float32)
    return DenseLayer(
        attn_norm_H=torch.ones(1),
        qkv=empty,
        o=empty,
        mlp_norm_H=torch.ones(1),
        gate_up=empty,
        down=empty,
        num_q_heads=case.q_heads,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        softmax_scale=case.head_dim**-0.5,
        eps=1e-5,
    )


def filled(ops: Ops, case: Case, dtype: torch.dtype) -> tuple[KVCache, list[list[int]]]:
    """A cache holding every sequence's whole context in layer 1, and NaN elsewhere."""
    rng = np.random.default_rng(1)
    kv = paged.poisoned_cache(ops, paged.spec(case, dtype))
    blocks = paged.tables(case, kv.spec.num_blocks)
    for sizes, table in zip(case.sequences, blocks, strict=True):
        shape = (sum(sizes), case.kv_heads, case.head_dim)
        paged.fill(kv, 1, table, rng.normal(size=shape), rng.normal(size=shape))
    return kv, blocks


def queries(case: Case) -> torch.Tensor:
    tokens = sum(new for _, new in case.sequences)
    return torch.randn(
        tokens, case.q_heads, case.head_dim, generator=torch.Generator().manual_seed(3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cache_round_trip(ops: Ops, dtype: torch.dtype) -> None:
    kv = paged.poisoned_cache(ops, paged.spec(Case(3, 3, 20, [(0, 40)]), dtype, layers=3))
    wrote = torch.randn(4, 2, 3, BLOCK, 20).to(dtype)
    kv.write(1, [7, 2, 9, 0], wrote)
    assert torch.equal(kv.read(1, [7, 2, 9, 0]), wrote)
    assert torch.equal(kv.read(1, [0, 7]), wrote[[3, 0]])
    assert kv.read(0, [7, 2, 9, 0]).isnan().all()
    assert kv.read(1, [1, 3]).isnan().all()
    assert kv.read(1, []).shape == (0, 2, 3, BLOCK, 20)
    strided = torch.randn(2, 3, BLOCK, 2, 20).to(dtype).permute(0, 3, 1, 2, 4)
    kv.write(2, [4, 5], strided)
    assert torch.equal(kv.read(2, [4, 5]), strided)
    elements = 3 * 2 * kv.spec.num_blocks * 3 * BLOCK * 20
    assert kv.nbytes >= elements * dtype.itemsize


def test_cache_copies(ops: Ops) -> None:
    kv = paged.poisoned_cache(ops, paged.spec(Case(1, 1, 8, [(0, 8)]), torch.float32))
    data = torch.ones(1, 2, 1, BLOCK, 8)
    kv.write(0, [0], data)
    out = kv.read(0, [0])
    data.zero_()
    out.zero_()
    assert (kv.read(0, [0]) == 1).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rope_write_kv(ops: Ops, kv_dtype: torch.dtype, case: Case) -> None:
    kv = paged.poisoned_cache(ops, paged.spec(case, kv_dtype))
    blocks = paged.tables(case, kv.spec.num_blocks)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    tokens = batch.positions_T.shape[0]
    width = (case.q_heads + 2 * case.kv_heads) * case.head_dim
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(tokens, width + 5, generator=generator)[:, 3 : 3 + width]
    q = ops.rope_write_kv(qkv, layer_of(ops, case), kv, 1, batch)

    heads = qkv.double().numpy().reshape(tokens, -1, case.head_dim)
    cos, sin = batch.cos_TD.double().numpy(), batch.sin_TD.double().numpy()
    q64, k64, v64 = np.split(heads, [case.q_heads, case.q_heads + case.kv_heads], axis=1)
    # |a cos| + |b sin|, the magnitude that float32 rounds, is at most |a| + |b|.
    half = case.head_dim // 2
    magnitude = np.abs(heads) + np.abs(np.roll(heads, half, axis=-1))
    q_size, k_size, _ = np.split(magnitude, [case.q_heads, case.q_heads + case.kv_heads], axis=1)
    tolerance.check(q, paged.rotate(q64, cos, sin), 4 * tolerance.U32 * q_size)

    slots = batch.slots_T.long()
    stored = kv.read(1, range(kv.spec.num_blocks)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    rotated = paged.rotate(k64, cos, sin)
    tolerance.check(stored[slots, 0], rotated, tolerance.stored(rotated, k_size, kv_dtype))
    assert torch.equal(stored[slots, 1], torch.tensor(v64).to(kv_dtype))
    untouched = torch.ones(stored.shape[0], dtype=torch.bool)
    untouched[slots] = False
    assert stored[untouched].isnan().all(), "a slot of another token was written"
    assert kv.read(0, range(kv.spec.num_blocks)).isnan().all(), "another layer was written"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paged_attention(ops: Ops, kv_dtype: torch.dtype, case: Case) -> None:
    kv, blocks = filled(ops, case, kv_dtype)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    scale = 1.3 * case.head_dim**-0.5
    out = ops.paged_attention(q, scale, kv, 1, batch)
    assert out.shape == (q.shape[0], case.q_heads * case.head_dim)
    check_attention(out, q, scale, kv, batch, blocks)


def check_attention(
    out: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    kv: KVCache,
    batch: FlatBatch,
    blocks: list[list[int]],
) -> None:
    starts = batch.query_start_S1.tolist()
    for s, table in enumerate(blocks):
        tokens = slice(starts[s], starts[s + 1])
        k, v = paged.gather(kv, 1, table, int(batch.context_S[s]))
        q64 = q[tokens].double().numpy()
        position = batch.positions_T[tokens].double().numpy()
        unit = tolerance.UNIT[kv.spec.dtype]
        expected, tol = paged.attend(q64, position, k, v, scale, unit)
        tolerance.check(out[tokens].view(q64.shape), expected, tol)


def test_attention_takes_strided_queries_and_sharp_scores(ops: Ops) -> None:
    """Scores of hundreds: a softmax that does not subtract the maximum overflows."""
    case = Case(4, 2, 64, [(40, 1), (3, 6)])
    kv, blocks = filled(ops, case, torch.float32)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = (queries(case) * 60).transpose(0, 1).contiguous().transpose(0, 1)
    check_attention(ops.paged_attention(q, 1.0, kv, 1, batch), q, 1.0, kv, batch, blocks)


def test_attention_sees_no_later_key(ops: Ops) -> None:
    """Changing the future changes no bit of the past."""
    case = Case(6, 2, 64, [(10, 9)])
    kv, blocks = filled(ops, case, torch.float32)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    before = ops.paged_attention(q, 0.1, kv, 1, batch)
    k, v = paged.gather(kv, 1, blocks[0], 19)
    k[15:] = 50.0
    v[15:] = 1e4
    paged.fill(kv, 1, blocks[0], k, v)
    after = ops.paged_attention(q, 0.1, kv, 1, batch)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[8]], ids=str)
def test_rows_do_not_depend_on_their_neighbours(
    ops: Ops, kv_dtype: torch.dtype, case: Case
) -> None:
    """Alone, in the batch, or in other chunks: the same bits (the reference: to rounding)."""
    kv, blocks = filled(ops, case, kv_dtype)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    whole = ops.paged_attention(q, 0.2, kv, 1, batch)
    for s, (_, new) in enumerate(case.sequences):
        first = int(batch.query_start_S1[s])
        for chunk in {1, 2, 5, new}:
            # interpreted, a call is slow: there only some of the small chunks
            step = max(chunk, 11) if ops.name == "triton" else chunk
            for start in range(0, new, step):
                cut = slice(start, min(new, start + chunk))
                tokens = slice(first + cut.start, first + cut.stop)
                alone = ops.paged_attention(q[tokens], 0.2, kv, 1, paged.only(batch, s, cut))
                if ops.name == "reference":
                    torch.testing.assert_close(alone, whole[tokens], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(alone, whole[tokens])


def test_attention_does_not_depend_on_threads(ops_by_threads: tuple[Ops, Ops]) -> None:
    case = CASES[8]
    results = []
    for ops in ops_by_threads:
        kv, blocks = filled(ops, case, torch.bfloat16)
        batch = paged.batch(case.sequences, blocks, case.head_dim)
        results.append(ops.paged_attention(queries(case), 0.2, kv, 1, batch))
    assert torch.equal(*results)

"""Windows and sinks: each query over its own last keys and the first ones, by definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.ops import Ops

from . import paged, tolerance
from .paged import BLOCK, Case
from .test_attention import filled, kv_dtype, queries
from .tolerance import Array

__all__ = ["kv_dtype"]  # a fixture

SCALE = 0.3
SHORT = [
    Case(4, 2, 64, [(7, 1), (8, 1), (9, 1), (0, 1), (31, 1)]),
    Case(5, 1, 24, [(0, 21), (15, 1), (13, 9), (16, 16)]),
]
LONG = Case(4, 2, 16, [(700, 1), (1180, 1), (560, 37), (3, 1)])
"""Past the splits of every backend, so that those between sinks and window are left out."""
MASKS = [
    AttentionMaskSpec(window=w, sinks=s)
    for w, s in ((1, 0), (1, 1), (6, 0), (6, 3), (9, 4), (64, 5))
]


def name(mask: AttentionMaskSpec) -> str:
    return f"{mask.window}+{mask.sinks}"


def visible_keys(mask: AttentionMaskSpec, position: int) -> Array:
    """Positions that a query sees, as the contract says it."""
    keys = np.arange(position + 1)
    seen: Array = keys[(position - keys < mask.window) | (keys < mask.sinks)]
    return seen


def expected(
    q: Array, position: Array, k: Array, v: Array, mask: AttentionMaskSpec, unit: float
) -> tuple[Array, Array]:
    """Each query alone, over just the keys that it sees."""
    parts = []
    for i, p in enumerate(position.astype(int)):
        seen = visible_keys(mask, p)
        last = np.array([len(seen) - 1])
        parts.append(paged.attend(q[i : i + 1], last, k[seen], v[seen], SCALE, unit))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def freed(
    kv: KVCache, case: Case, blocks: list[list[int]], batch: FlatBatch, mask: AttentionMaskSpec
) -> FlatBatch:
    """The batch once the engine gave back what it may: WILD table entries, blocks of NaN."""
    table = batch.block_table_SB.clone()
    for s, (cached, _) in enumerate(case.sequences):
        first = max(0, cached - mask.window + 1) // BLOCK
        gone = range(-(-mask.sinks // BLOCK), first)
        if gone and kv.spec.dtype != torch.int8:
            nan = torch.full((len(gone), 2, case.kv_heads, BLOCK, case.head_dim), torch.nan)
            kv.write(1, blocks[s][gone.start : gone.stop], nan)
        table[s, list(gone)] = paged.WILD
    return replace(batch, block_table_SB=table)


@pytest.mark.parametrize("mask", MASKS, ids=name)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_windows(ops: Ops, kv_dtype: torch.dtype, case: Case, mask: AttentionMaskSpec) -> None:
    check(ops, kv_dtype, case, mask)


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMaskSpec(window=40),
        AttentionMaskSpec(window=130, sinks=4),
        AttentionMaskSpec(window=75, sinks=600),
    ],
    ids=name,
)
def test_windows_far_from_the_start(
    ops: Ops, kv_dtype: torch.dtype, mask: AttentionMaskSpec
) -> None:
    check(ops, kv_dtype, LONG, mask)


def check(ops: Ops, dtype: torch.dtype, case: Case, mask: AttentionMaskSpec) -> None:
    kv, blocks = filled(ops, case, dtype)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    starts = batch.query_start_S1.tolist()
    parts = []
    for s, (cached, new) in enumerate(case.sequences):
        tokens = slice(starts[s], starts[s + 1])
        k, v = paged.gather(kv, 1, blocks[s], cached + new)
        position = batch.positions_T[tokens].double().numpy()
        unit = tolerance.UNIT[dtype]
        parts.append(expected(q[tokens].double().numpy(), position, k, v, mask, unit))
    out = ops.paged_attention(q, SCALE, kv, 1, freed(kv, case, blocks, batch, mask), mask)
    tol = np.concatenate([one[1] for one in parts])
    tolerance.check(out.view(q.shape), np.concatenate([one[0] for one in parts]), tol)


def test_an_int8_cache(ops: Ops) -> None:
    """The same numbers as where the reference reads the levels, one query at a time."""
    mask, case = AttentionMaskSpec(window=37, sinks=5), Case(6, 2, 32, [(100, 1), (60, 7)])
    spec = replace(paged.spec(case, torch.float32), dtype=torch.int8)
    kv = ops.kv_cache(spec, torch.device("cpu"))
    blocks = paged.tables(case, spec.num_blocks)
    k, v, flat = int8_blocks(kv, spec, blocks)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    held = freed(kv, case, blocks, batch, mask)
    out = ops.paged_attention(q, SCALE, kv, 1, held, mask).view(q.shape)
    starts = batch.query_start_S1.tolist()
    for s, table in enumerate(blocks):
        tokens = slice(starts[s], starts[s + 1])
        slots = flat[table].reshape(-1)
        position = batch.positions_T[tokens].double().numpy()
        want, tol = expected(
            q[tokens].double().numpy(), position, k[slots], v[slots], mask, tolerance.U32
        )
        tolerance.check(out[tokens], want, 4 * tol)


def int8_blocks(
    kv: KVCache, spec: KVCacheSpec, blocks: list[list[int]]
) -> tuple[Array, Array, Array]:
    """Fill layer 1 with random levels: keys and values by slot in float64, slots by block."""
    rng = np.random.default_rng(5)
    shape = (spec.num_blocks, 2, spec.num_kv_heads, BLOCK)
    levels = rng.integers(-127, 128, (*shape, spec.head_dim), dtype=np.int8)
    scales = rng.uniform(0.001, 0.02, (*shape, 1)).astype("<f4")
    data = np.concatenate([levels, scales.view(np.int8)], axis=-1)
    kv.write(1, range(spec.num_blocks), torch.from_numpy(data))
    values = levels.astype(np.float64) * scales
    slots = values.transpose(0, 3, 1, 2, 4).reshape(-1, 2, spec.num_kv_heads, spec.head_dim)
    at = np.arange(spec.num_blocks * BLOCK).reshape(spec.num_blocks, BLOCK)
    return slots[:, 0], slots[:, 1], at


@pytest.mark.parametrize(
    "mask", [AttentionMaskSpec(window=66), AttentionMaskSpec(window=66, sinks=5)], ids=name
)
def test_rows_do_not_depend_on_their_neighbours(
    ops: Ops, kv_dtype: torch.dtype, mask: AttentionMaskSpec
) -> None:
    """Alone, in the batch, or in other chunks: the same bits (the reference: to rounding)."""
    case = Case(6, 2, 32, [(600, 1), (0, 70), (530, 45), (100, 1)])
    kv, blocks = filled(ops, case, kv_dtype)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    whole = ops.paged_attention(q, 0.2, kv, 1, batch, mask)
    for s, (_, new) in enumerate(case.sequences):
        first = int(batch.query_start_S1[s])
        for chunk in sorted({1, 7, new}):
            # interpreted, a call is slow: there only some of the small chunks
            step = max(chunk, 23) if ops.name == "triton" else chunk
            for start in range(0, new, step):
                cut = slice(start, min(new, start + chunk))
                tokens = slice(first + cut.start, first + cut.stop)
                of_one = paged.only(batch, s, cut)
                alone = ops.paged_attention(q[tokens], 0.2, kv, 1, of_one, mask)
                if ops.name == "reference":
                    torch.testing.assert_close(alone, whole[tokens], rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(alone, whole[tokens])


def test_windows_do_not_depend_on_threads(ops_by_threads: tuple[Ops, Ops]) -> None:
    results = []
    for ops in ops_by_threads:
        kv, blocks = filled(ops, LONG, torch.bfloat16)
        batch = paged.batch(LONG.sequences[:2], blocks[:2], LONG.head_dim)
        mask = AttentionMaskSpec(window=600, sinks=4)
        results.append(ops.paged_attention(queries(LONG)[:2], 0.2, kv, 1, batch, mask))
    assert torch.equal(*results)


def test_a_window_longer_than_the_context_changes_nothing(ops: Ops) -> None:
    case = Case(4, 2, 64, [(20, 3), (9, 1)])
    kv, blocks = filled(ops, case, torch.float32)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    plain = ops.paged_attention(q, SCALE, kv, 1, batch)
    for mask in (AttentionMaskSpec(window=8192), AttentionMaskSpec(window=20, sinks=4)):
        assert torch.equal(ops.paged_attention(q, SCALE, kv, 1, batch, mask), plain)


def test_what_a_query_sees_is_refused_where_it_means_nothing() -> None:
    for wrong, why in (
        ({"window": -1}, "at least 0"),
        ({"window": 4, "chunk_size": 4}, "not both"),
        ({"sinks": 4}, "need a `window`"),
    ):
        with pytest.raises(ValueError, match=why):
            AttentionMaskSpec(**wrong)

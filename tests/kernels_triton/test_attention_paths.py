"""Attention's paths: tiles of few rows in decodes, shared tiles of prompts, one-byte caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from kernels import paged
from kernels.paged import Case

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.ops import Ops
from arriero.kernels.reference.backend import ReferenceOps
from support import triton_interpreter

triton_interpreter.install()
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from arriero.kernels.triton import decode, prefill, softmax, triton_ops, tuning  # noqa: E402
from arriero.kernels.triton.tuning import AttentionBlocks  # noqa: E402

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
SHARED = Case(4, 2, 16, [(250, 10), (300, 1), (700, 5), (3, 4)])
"""Few queries over contexts of several splits; from position 256 on splits are twice as long."""


def caches(ops: Ops, case: Case, dtype: torch.dtype) -> tuple[KVCache, KVCache, list[list[int]]]:
    """A cache of random numbers, the reference's float32 cache of the same, and block tables."""
    spec = paged.spec(case, dtype)
    ours = ops.kv_cache(spec, CPU)
    theirs = ReferenceOps(CPU).kv_cache(paged.spec(case, torch.float32), CPU)
    every = range(spec.num_blocks)
    rng = np.random.default_rng(2)
    shape = (spec.num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
    data = torch.from_numpy(rng.normal(size=shape)).float()
    if dtype == torch.int8:
        levels = torch.from_numpy(rng.integers(-127, 128, size=shape, dtype=np.int8))
        scales = torch.from_numpy(rng.uniform(0.001, 0.02, size=(*shape[:-1], 1))).float()
        ours.write(1, every, torch.cat([levels, scales.view(torch.int8)], -1))
        theirs.write(1, every, levels.float() * scales)
    else:
        ours.write(1, every, data.to(dtype))
        theirs.write(1, every, data.to(dtype).float())
    return ours, theirs, paged.tables(case, spec.num_blocks)


def queries(case: Case) -> torch.Tensor:
    shape = (sum(new for _, new in case.sequences), case.q_heads, case.head_dim)
    return torch.from_numpy(np.random.default_rng(3).normal(size=shape)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, FP8], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e6], ids=["plain", "beyond float16"])
def test_a_fast_decode_is_the_references(
    dtype: torch.dtype, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with queries beyond the range of float16; one-byte caches in float16, as on a GPU."""
    if dtype == torch.float16 and size > 1:
        pytest.skip("a model in float16 has no such query")
    if dtype.itemsize == 1:
        types = {"QK": tl.float16, "PV": tl.float32 if dtype == torch.int8 else tl.float16}
        monkeypatch.setattr(softmax, "product_types", lambda dtype: types)
    case = Case(10, 2, 32, [(300, 1), (20, 1)])
    fast = triton_ops(CPU, batch_independent=False)
    ours, theirs, blocks = caches(fast, case, dtype)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q, scale = queries(case) * size, 0.3 / size
    torch.testing.assert_close(
        fast.paged_attention(q, scale, ours, 1, batch),
        ReferenceOps(CPU).paged_attention(q, scale, theirs, 1, batch),
        rtol=3e-3,
        atol=3e-3,
    )


def test_the_exact_mode_keeps_the_tile_of_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []

    def noted(*args: Any) -> None:  # noqa: ANN401
        tiles.append(args[-1].block_m)
        decode.attend_decodes(*args)

    monkeypatch.setattr("arriero.kernels.triton.backend.attend_decodes", noted)
    case = Case(2, 1, 16, [(5, 1)])
    for independent in (True, False):
        ops = triton_ops(CPU, batch_independent=independent)
        kv, _, blocks = caches(ops, case, torch.float32)
        batch = paged.batch(case.sequences, blocks, case.head_dim)
        ops.paged_attention(queries(case), 0.2, kv, 1, batch)
    exact = tuning.attention_blocks(CPU, 16, torch.float32)
    assert tiles == [exact.block_m, exact.fast_block_m] == [64, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_shared_tiles_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = triton_ops(CPU)
    kv, theirs, blocks = caches(ops, SHARED, dtype)
    batch = paged.batch(SHARED.sequences, blocks, SHARED.head_dim)
    q, folds = queries(SHARED), []
    fold = prefill._prefill_fold

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:  # noqa: ANN401
            folds.append(grid)
            return fold[grid]

    monkeypatch.setattr(prefill, "_prefill_fold", Counted())
    shared = ops.paged_attention(q, 0.2, kv, 1, batch)
    assert len(folds) == 1, "several programs share a tile"
    monkeypatch.setattr(prefill, "FULL_GPU", 0)
    assert torch.equal(ops.paged_attention(q, 0.2, kv, 1, batch), shared)
    assert len(folds) == 1
    torch.testing.assert_close(
        shared, ReferenceOps(CPU).paged_attention(q, 0.2, theirs, 1, batch), rtol=3e-3, atol=3e-3
    )


def blocks_of_h100() -> AttentionBlocks:
    entry = tuning._table()["default"]["attention"]["*"]
    return AttentionBlocks(**entry).prefill


def lanes(sequences: list[tuple[int, int]], heads: int = 16, kv_heads: int = 1, **mask: int) -> int:
    """Programs for each tile; by default with the heads of 405B at TP8."""
    blocks = AttentionBlocks(**tuning._table()["default"]["attention"]["*"]).prefill
    spec = paged.spec(Case(heads, kv_heads, 128, [(0, 1)]), torch.bfloat16)
    batch = SimpleNamespace(
        context_S=torch.zeros(len(sequences)),
        max_query=max(new for _, new in sequences),
        max_context=max(sum(sizes) for sizes in sequences),
    )
    tokens = sum(new for _, new in sequences)
    of_mask = AttentionMaskSpec(**mask)
    return prefill.programs_per_tile(tokens, heads, spec, cast(Any, batch), of_mask, blocks)


def test_programs_share_tiles_only_where_tiles_are_few() -> None:
    long, most = 131072, 64
    assert lanes([(long, 32)]) == most, "five tiles of 8 tokens"
    assert lanes([(long, 1)] * 64 + [(long, 32)]) == most, "decodes are in another launch"
    assert lanes([(long, 248)]) == 1024 // 32
    assert lanes([(long, 256)]) == 1, "splits of 136 MB"
    assert lanes([(long, 96)], 32, 8) == 1024 // 32
    assert lanes([(long, 2)] * 128, 5) == 1, "as many prompts"
    assert lanes([(long, 32)], window=4096) == 1, "few keys"
    assert lanes([(0, 0)] * 100 + [(long, 96)]) == most, "a half without rows of 100 sequences"
    assert [lanes([(context, 32)]) for context in (224, 225)] == [1, 2], "a program for each split"

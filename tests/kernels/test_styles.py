"""Llama 4's attention: RoPE by pairs, QK norm, query scale, chunk-local windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.layers import AttentionStyle
from arriero.kernels.ops import Ops

from . import paged, tolerance
from .paged import BLOCK, Case
from .test_attention import filled, layer_of, queries
from .tolerance import Array

ROPE = Case(6, 2, 20, [(0, 5), (37, 1), (14, 3)])
STYLES = {
    "pairs": AttentionStyle(rope="pairs"),
    "none": AttentionStyle(rope="none"),
    "norm": AttentionStyle(qk_norm=True),
    "scout": AttentionStyle(rope="pairs", qk_norm=True, mask=AttentionMaskSpec(chunk_size=8)),
    "global": AttentionStyle(rope="none", query_scale=(0.1, 8)),
    "all": AttentionStyle(rope="halves", qk_norm=True, query_scale=(0.5, 3)),
}


def encode(x: Array, style: AttentionStyle, cos: Array, sin: Array) -> Array:
    if style.rope == "halves":
        x = paged.rotate(x, cos, sin)
    elif style.rope == "pairs":
        z = (x[..., ::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, None]
        x = np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
    if style.qk_norm:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x


@pytest.mark.parametrize("name", STYLES)
def test_rope_write_kv(ops: Ops, name: str) -> None:
    style = STYLES[name]
    kv = paged.poisoned_cache(ops, paged.spec(ROPE, torch.float32))
    batch = paged.batch(ROPE.sequences, paged.tables(ROPE, kv.spec.num_blocks), ROPE.head_dim)
    tokens = batch.positions_T.shape[0]
    qkv = torch.randn(tokens, 10 * ROPE.head_dim, generator=torch.Generator().manual_seed(1))
    q = ops.rope_write_kv(qkv, replace(layer_of(ops, ROPE), style=style), kv, 1, batch)

    cos, sin = batch.cos_TD.double().numpy(), batch.sin_TD.double().numpy()
    q64, k64, v64 = np.split(qkv.double().numpy().reshape(tokens, 10, -1), [6, 8], axis=1)
    expected = encode(q64, style, cos, sin)
    if style.query_scale is not None:
        gain, floor = style.query_scale
        steps = np.floor((batch.positions_T.double().numpy() + 1) / floor)
        expected = expected * (1 + gain * np.log(1 + steps))[:, None, None]
    # Every element comes from two products and at most three factors of its head's size.
    size = np.abs(expected).max(-1, keepdims=True)
    tolerance.check(q, expected, 16 * tolerance.U32 * size)
    stored = kv.read(1, range(kv.spec.num_blocks)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    slots = batch.slots_T.long()
    k_expected = encode(k64, style, cos, sin)
    limit = 16 * tolerance.U32 * np.abs(k_expected).max(-1, keepdims=True)
    tolerance.check(stored[slots, 0], k_expected, limit)
    assert torch.equal(stored[slots, 1], torch.tensor(v64).float())


def chunked(q: Array, position: Array, k: Array, v: Array, chunk: int) -> tuple[Array, Array]:
    """Each query alone, over the keys of its own chunk up to itself."""
    parts = []
    for i, p in enumerate(position.astype(int)):
        window = slice(p // chunk * chunk, p + 1)
        last = np.array([p - window.start])
        parts.append(paged.attend(q[i : i + 1], last, k[window], v[window], 0.3, tolerance.U32))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize("chunk", [1, 6, 8, 16, 64])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 64, [(7, 1), (8, 1), (9, 1), (0, 1), (31, 1)]),
        Case(5, 1, 24, [(0, 21), (15, 1), (13, 9), (16, 16)]),
    ],
    ids=str,
)
def test_chunk_local_attention(ops: Ops, case: Case, chunk: int) -> None:
    """Blocks before the first query's chunk are gone, table entries and all."""
    kv, blocks = filled(ops, case, torch.float32)
    whole = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    starts = whole.query_start_S1.tolist()
    table = whole.block_table_SB.clone()
    expected = []
    for s, (cached, new) in enumerate(case.sequences):
        tokens = slice(starts[s], starts[s + 1])
        k, v = paged.gather(kv, 1, blocks[s], cached + new)
        position = whole.positions_T[tokens].double().numpy()
        expected.append(chunked(q[tokens].double().numpy(), position, k, v, chunk))
        freed = cached // chunk * chunk // BLOCK
        table[s, :freed] = paged.WILD
        if freed:
            nan = torch.full((freed, 2, case.kv_heads, BLOCK, case.head_dim), torch.nan)
            kv.write(1, blocks[s][:freed], nan)
    held = replace(whole, block_table_SB=table)
    out = ops.paged_attention(q, 0.3, kv, 1, held, AttentionMaskSpec(chunk_size=chunk))
    tol = np.concatenate([e[1] for e in expected])
    tolerance.check(out.view(q.shape), np.concatenate([e[0] for e in expected]), tol)


def test_a_chunk_longer_than_the_context_changes_nothing(ops: Ops) -> None:
    case = Case(4, 2, 64, [(20, 3), (9, 1)])
    kv, blocks = filled(ops, case, torch.float32)
    batch = paged.batch(case.sequences, blocks, case.head_dim)
    q = queries(case)
    assert torch.equal(
        ops.paged_attention(q, 0.3, kv, 1, batch, AttentionMaskSpec(chunk_size=8192)),
        ops.paged_attention(q, 0.3, kv, 1, batch),
    )

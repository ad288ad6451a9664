"""Sequences in a paged cache, and attention over them in float64: the tests' own definition.

Shapes as in `kernels/ops.py`. Nothing here is shared with the code under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.ops import Ops

from .tolerance import Array

BLOCK = 4
WILD = 2**31 - 1
"""A table entry past the context: a backend that follows it reads out of bounds."""


@dataclass(frozen=True)
class Case:
    """One shape class: heads, head_dim, and for each sequence (tokens cached, tokens new)."""

    q_heads: int
    kv_heads: int
    head_dim: int
    sequences: Sequence[tuple[int, int]]

    def __str__(self) -> str:
        sizes = "_".join(f"{cached}+{new}" for cached, new in self.sequences)
        return f"{self.q_heads}q{self.kv_heads}kv-d{self.head_dim}-{sizes}"


CASES = [
    Case(1, 1, 64, [(0, 1)]),
    Case(9, 3, 64, [(0, 5), (11, 1), (3, 1), (0, 1), (6, 9), (15, 1), (16, 1), (17, 2)]),
    Case(7, 7, 80, [(5, 1), (0, 13)]),
    Case(14, 7, 128, [(31, 1), (8, 4)]),
    Case(8, 1, 128, [(70, 1), (1, 1), (0, 37)]),
    Case(6, 2, 16, [(0, 3), (2, 3), (29, 1)]),
    Case(5, 1, 64, [(130, 1), (100, 20)]),
    Case(3, 3, 18, [(4, 4)]),
    Case(12, 3, 72, [(300, 1), (0, 66)]),
]


def spec(case: Case, dtype: torch.dtype, layers: int = 2) -> KVCacheSpec:
    blocks = sum(-(-(cached + new) // BLOCK) for cached, new in case.sequences) + 3
    return KVCacheSpec(
        num_layers=layers,
        num_blocks=blocks,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        block_size=BLOCK,
        dtype=dtype,
    )


def poisoned_cache(ops: Ops, of: KVCacheSpec) -> KVCache:
    """Every slot NaN: what is read and was not written shows."""
    kv = ops.kv_cache(of, torch.device("cpu"))
    shape = (of.num_blocks, 2, of.num_kv_heads, of.block_size, of.head_dim)
    for layer in range(of.num_layers):
        kv.write(layer, range(of.num_blocks), torch.full(shape, torch.nan))
    return kv


def tables(case: Case, num_blocks: int, seed: int = 0) -> list[list[int]]:
    """Scattered block ids of each sequence, enough for its context."""
    free = np.random.default_rng(seed).permutation(num_blocks).tolist()
    return [[free.pop() for _ in range(-(-sum(sizes) // BLOCK))] for sizes in case.sequences]


def batch(
    sequences: Sequence[tuple[int, int]], blocks: Sequence[Sequence[int]], head_dim: int
) -> FlatBatch:
    """The flat batch of sequences with (cached, new) tokens at the given blocks."""
    positions = [p for cached, new in sequences for p in range(cached, cached + new)]
    slots = [
        table[p // BLOCK] * BLOCK + p % BLOCK
        for (cached, new), table in zip(sequences, blocks, strict=True)
        for p in range(cached, cached + new)
    ]
    width = max(len(table) for table in blocks) + 2
    inverse = 1e4 ** -(np.arange(0, head_dim, 2) / head_dim)
    angle = np.array(positions)[:, None] * inverse
    return FlatBatch(
        positions_T=torch.tensor(positions, dtype=torch.int32),
        query_start_S1=torch.tensor(
            np.cumsum([0] + [new for _, new in sequences]), dtype=torch.int32
        ),
        context_S=torch.tensor([sum(sizes) for sizes in sequences], dtype=torch.int32),
        block_table_SB=torch.tensor(
            [[*table, *[WILD] * (width - len(table))] for table in blocks], dtype=torch.int32
        ),
        slots_T=torch.tensor(slots, dtype=torch.int32),
        cos_TD=torch.tensor(np.cos(angle), dtype=torch.float32),
        sin_TD=torch.tensor(np.sin(angle), dtype=torch.float32),
        max_query=max(new for _, new in sequences),
        max_context=max(sum(sizes) for sizes in sequences),
    )


def only(whole: FlatBatch, s: int, cut: slice) -> FlatBatch:
    """The tokens `cut` (counted inside sequence s) of one sequence, as a batch of their own."""
    first = int(whole.query_start_S1[s])
    tokens = slice(first + cut.start, first + cut.stop)
    context = int(whole.positions_T[tokens.stop - 1]) + 1
    return replace(
        whole,
        positions_T=whole.positions_T[tokens],
        query_start_S1=torch.tensor([0, cut.stop - cut.start], dtype=torch.int32),
        context_S=torch.tensor([context], dtype=torch.int32),
        block_table_SB=whole.block_table_SB[s : s + 1],
        slots_T=whole.slots_T[tokens],
        cos_TD=whole.cos_TD[tokens],
        sin_TD=whole.sin_TD[tokens],
        max_query=cut.stop - cut.start,
        max_context=context,
    )


def fill(kv: KVCache, layer: int, table: Sequence[int], k_CKD: Array, v_CKD: Array) -> None:
    """Write a sequence's keys and values through the canonical layout; slots past them stay NaN."""
    count = k_CKD.shape[0]
    used = list(table[: -(-count // BLOCK)])
    if not used:
        return
    slots = np.full((len(used) * BLOCK, 2, *k_CKD.shape[1:]), np.nan)
    slots[:count, 0], slots[:count, 1] = k_CKD, v_CKD
    data = slots.reshape(len(used), BLOCK, 2, *k_CKD.shape[1:]).transpose(0, 2, 3, 1, 4)
    kv.write(layer, used, torch.tensor(data, dtype=torch.float32))


def gather(kv: KVCache, layer: int, table: Sequence[int], count: int) -> tuple[Array, Array]:
    """A sequence's keys and values [count, K, D] as stored, in float64."""
    data = kv.read(layer, list(table)).double().numpy()
    flat = data.transpose(0, 3, 1, 2, 4).reshape(-1, 2, data.shape[2], data.shape[4])
    return flat[:count, 0], flat[:count, 1]


def rotate(x_TND: Array, cos_TD: Array, sin_TD: Array) -> Array:
    """RoPE by halves, as a complex product."""
    half = x_TND.shape[-1] // 2
    z = (x_TND[..., :half] + 1j * x_TND[..., half:]) * (cos_TD + 1j * sin_TD)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def attend(
    q_QND: Array, position_Q: Array, k_CKD: Array, v_CKD: Array, scale: float, unit: float
) -> tuple[Array, Array]:
    """Attention of one sequence's queries: ([Q, N, D], its tolerance).

    `unit` is the rounding unit of the products' inputs. A score is off by the random walk of its
    D terms; that times 2 bounds the relative error of a softmax weight; values and weights may be
    rounded once each.
    """
    out = np.empty(q_QND.shape)
    tolerance = np.empty(q_QND.shape)
    group = q_QND.shape[1] // k_CKD.shape[1]
    head_dim = q_QND.shape[2]
    for i, position in enumerate(position_Q.astype(int)):
        for head in range(q_QND.shape[1]):
            k, v = k_CKD[: position + 1, head // group], v_CKD[: position + 1, head // group]
            terms = q_QND[i, head] * k * scale
            score = terms.sum(-1)
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            spread = np.sqrt((terms**2).sum(-1)).max()
            size = np.abs(terms).sum(-1).max()
            walk = 2 * np.sqrt(head_dim) + 2
            relative = 2 * (4 * unit * spread + walk * 2.0**-24 * size) + 4 * unit
            relative += (8 + np.abs(score - score.max()).max() + position**0.5) * 2.0**-24
            out[i, head] = weight @ v
            tolerance[i, head] = relative * (weight @ np.abs(v))
    return out, tolerance

"""Attention of sequences with several queries: a program for each tile of queries, over all keys.

A tile has all query heads that share a key/value head, so that a program reads each key once for
all these heads; tiles of keys outside the mask are skipped. The order of sums is that of `softmax`,
the same as in a decode at the same position. After Dao, "FlashAttention-2", 2023. Knows tiles;
knows nothing of layers. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import math

from torch import Tensor

import triton.language as tl
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import kernel, power_of_two
from arriero.kernels.triton.softmax import (
    attend_keys,
    first_seen,
    fold,
    leading_splits,
    options,
    quotient,
    span_of,
    split_length,
)
from arriero.kernels.triton.tuning import AttentionBlocks


@kernel
def find_tile(
    starts: tl.tensor, tile: tl.tensor, count: tl.tensor, TILE: tl.constexpr
) -> tl.tensor:
    """The run of rows that a tile belongs to, and the index of the tile within the run.

    Run r has rows starts[r] .. starts[r + 1] and the tiles from starts[r] // TILE + r on. This rule
    gives each run enough tiles, and needs no table.
    """
    low = tile * 0
    high = low + count - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = tl.load(starts + middle) // TILE + middle <= tile
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    return low, tile - (tl.load(starts + low) // TILE + low)


@kernel
def _prefill(
    q: tl.tensor,
    query_start: tl.tensor,
    positions: tl.tensor,
    tables: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    num_sequences: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    span: tl.tensor,
    sinks: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST: tl.constexpr,
    CHUNKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    KV_INT8: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    sequence, tile = find_tile(query_start, tl.program_id(0), num_sequences, TOKENS)
    kv_head = tl.program_id(1)
    start = tl.load(query_start + sequence)
    stop = tl.load(query_start + sequence + 1)
    token = start + tile * TOKENS
    if (stop - start == 1) | (token >= stop):
        return
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token_M = token + row // GROUP
    head_M = kv_head * GROUP + row % GROUP
    valid_M = (row < TOKENS * GROUP) & (token_M < stop)
    valid_MD = valid_M[:, None] & (d < HEAD_DIM)[None, :]
    at_MD = q + token_M.to(tl.int64)[:, None] * q_stride + head_M[:, None] * q_head_stride
    q_MD = tl.load(at_MD + d[None, :], mask=valid_MD, other=0.0).to(DOT)
    last_M = tl.load(positions + token_M, mask=valid_M, other=0)
    length_M = split_length(last_M, SPLIT, MOST)
    lowest = first_seen(tl.load(positions + token), span, CHUNKED, WINDOWED)
    highest = tl.load(positions + tl.minimum(token + TOKENS, stop) - 1)
    first_M = first_seen(last_M, span, CHUNKED, WINDOWED)
    last_M = tl.where(valid_M, last_M, -1)
    table = tables + sequence.to(tl.int64) * table_stride
    m_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    all_m_M, all_l_M, all_acc_MD = m_M, l_M, acc_MD
    first_split = lowest // SPLIT
    leading = leading_splits(first_split, SPLIT, sinks, SINKS)
    for i in range(0, leading + highest // SPLIT + 1 - first_split):
        split = first_split + i
        after = split + 1
        if SINKS:
            split = tl.where(i < leading, i, split - leading)
            after = tl.where(i + 1 < leading, i + 1, first_split + i + 1 - leading)
        m_M, l_M, acc_MD = attend_keys(
            q_MD,
            first_M,
            last_M,
            split,
            SPLIT,
            lowest,
            highest,
            sinks,
            table,
            cache,
            scales,
            kv_head,
            scale,
            m_M,
            l_M,
            acc_MD,
            BLOCK_SIZE,
            KV_HEADS,
            HEAD_DIM,
            BLOCK_N,
            BLOCK_D,
            SINKS,
            KV_INT8,
            DOT,
        )
        # Rows with a split that ends here, or without further keys, fold the split and start anew.
        ends_M = after * SPLIT // length_M != split * SPLIT // length_M
        ends_M |= last_M < (split + 1) * SPLIT
        part_m_M = tl.where(ends_M, m_M, -float("inf"))
        all_m_M, all_l_M, all_acc_MD = fold(all_m_M, all_l_M, all_acc_MD, part_m_M, l_M, acc_MD)
        m_M = tl.where(ends_M, -float("inf"), m_M)
        l_M = tl.where(ends_M, 0.0, l_M)
        acc_MD = tl.where(ends_M[:, None], 0.0, acc_MD)
    to = out + (token_M.to(tl.int64) * (KV_HEADS * GROUP) + head_M)[:, None] * HEAD_DIM
    result = quotient(all_acc_MD, all_l_M)
    tl.store(to + d[None, :], result.to(out.dtype.element_ty), mask=valid_MD)


def attend_prefills(
    q_TND: Tensor,
    out_TND: Tensor,
    scale: float,
    kv: TritonKVCache,
    kv_layer: int,
    batch: FlatBatch,
    mask: AttentionMaskSpec,
    blocks: AttentionBlocks,
) -> None:
    """Fill the rows of `out` that belong to sequences with more than one query."""
    num_sequences = batch.context_S.shape[0]
    num_tokens, q_heads, _ = q_TND.shape
    kv_heads = kv.spec.num_kv_heads
    group = q_heads // kv_heads
    blocks = blocks.prefill
    block_m = power_of_two(group, blocks.block_m)
    _prefill[(num_tokens // (block_m // group) + num_sequences, kv_heads)](
        q_TND,
        batch.query_start_S1,
        batch.positions_T,
        batch.block_table_SB,
        kv.data[kv_layer],
        None if kv.scales is None else kv.scales[kv_layer],
        out_TND,
        num_sequences,
        q_TND.stride(0),
        q_TND.stride(1),
        batch.block_table_SB.stride(0),
        scale / math.log(2),
        span_of(mask),
        mask.sinks,
        **options(kv.spec, group, blocks, mask),
    )

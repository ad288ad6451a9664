"""Attention of sequences with several queries: a program for each tile of queries, over all keys.

A tile has all query heads that share a key/value head, so that a program reads each key once for
all these heads; tiles of keys outside the mask are skipped. After Dao, "FlashAttention-2", 2023.

Few queries have few tiles, which leave most of a GPU idle over a long context: there several
programs share the keys of a tile, write the splits of each row, and a second kernel folds them. The
order of sums is that of `softmax` either way, and the same as in a decode at the same position.
Knows tiles; knows nothing of layers. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import math

from torch import Tensor

import triton.language as tl
from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import kernel, power_of_two
from arriero.kernels.triton.softmax import (
    attend_keys,
    empty_parts,
    first_seen,
    fold,
    fold_options,
    heads_per_fold,
    leading_splits,
    options,
    quotient,
    span_of,
    split_length,
    store_folded,
)
from arriero.kernels.triton.tuning import AttentionBlocks
from arriero.kernels.triton.widen import scaled_queries

PROGRAMS = 1024
"""Largest number of programs that share tiles; as in a decode."""
FULL_GPU = 132
"""Processors of an H100 or H200 (an A100 has 108, a B200 148): with tiles for half of them or more,
no tile is shared."""
PARTS_NBYTES = 128 << 20
"""Largest memory for splits of rows; more rows have tiles enough."""


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
    part_m: tl.tensor,
    part_l: tl.tensor,
    part_acc: tl.tensor,
    num_sequences: tl.tensor,
    num_lanes: tl.tensor,
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
    QK: tl.constexpr,
    PV: tl.constexpr,
    SHARED: tl.constexpr,
) -> None:
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    sequence, tile = find_tile(query_start, tl.program_id(0), num_sequences, TOKENS)
    kv_head = tl.program_id(1)
    start = tl.load(query_start + sequence)
    stop = tl.load(query_start + sequence + 1)
    token = start + tile * TOKENS
    if (stop - start == 1) | (token >= stop):
        return
    lowest = first_seen(tl.load(positions + token), span, CHUNKED, WINDOWED)
    highest = tl.load(positions + tl.minimum(token + TOKENS, stop) - 1)
    first_split = lowest // SPLIT
    leading = leading_splits(first_split, SPLIT, sinks, SINKS)
    begin = first_split * 0
    end = leading + highest // SPLIT + 1 - first_split
    if SHARED:  # shares begin where the longest split of a row begins, and so a split of each row
        longest = split_length(highest, SPLIT, MOST) // SPLIT
        share = tl.cdiv(tl.cdiv(end, longest), num_lanes) * longest
        begin = tl.program_id(2) * share
        end = tl.minimum(begin + share, end)
        if begin >= end:
            return
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    token_M = token + row // GROUP
    head_M = kv_head * GROUP + row % GROUP
    valid_M = (row < TOKENS * GROUP) & (token_M < stop)
    valid_MD = valid_M[:, None] & (d < HEAD_DIM)[None, :]
    at_MD = q + token_M.to(tl.int64)[:, None] * q_stride + head_M[:, None] * q_head_stride
    q_MD = tl.load(at_MD + d[None, :], mask=valid_MD, other=0.0)
    q_MD, scale_M = scaled_queries(q_MD, scale, QK)
    last_M = tl.load(positions + token_M, mask=valid_M, other=0)
    length_M = split_length(last_M, SPLIT, MOST)
    first_M = first_seen(last_M, span, CHUNKED, WINDOWED)
    last_M = tl.where(valid_M, last_M, -1)
    table = tables + sequence.to(tl.int64) * table_stride
    m_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    all_m_M, all_l_M, all_acc_MD = m_M, l_M, acc_MD
    for i in range(begin, end):
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
            scale_M,
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
            QK,
            PV,
        )
        # Rows with a split that ends here, or without further keys, fold the split and start anew.
        ends_M = after * SPLIT // length_M != split * SPLIT // length_M
        ends_M |= last_M < (split + 1) * SPLIT
        if SHARED:
            ends_M &= split * SPLIT <= last_M
            if tl.max(ends_M.to(tl.int32), 0) > 0:
                line_M = token_M.to(tl.int64) * (KV_HEADS * GROUP) + head_M
                line_M = line_M * MOST + split * SPLIT // length_M
                tl.store(part_m + line_M, m_M, mask=ends_M)
                tl.store(part_l + line_M, l_M, mask=ends_M)
                part_MD = part_acc + line_M[:, None] * HEAD_DIM + d[None, :]
                tl.store(part_MD, acc_MD, mask=ends_M[:, None] & (d < HEAD_DIM)[None, :])
        else:
            part_m_M = tl.where(ends_M, m_M, -float("inf"))
            all_m_M, all_l_M, all_acc_MD = fold(all_m_M, all_l_M, all_acc_MD, part_m_M, l_M, acc_MD)
        m_M = tl.where(ends_M, -float("inf"), m_M)
        l_M = tl.where(ends_M, 0.0, l_M)
        acc_MD = tl.where(ends_M[:, None], 0.0, acc_MD)
    if not SHARED:
        to = out + (token_M.to(tl.int64) * (KV_HEADS * GROUP) + head_M)[:, None] * HEAD_DIM
        result = quotient(all_acc_MD, all_l_M)
        tl.store(to + d[None, :], result.to(out.dtype.element_ty), mask=valid_MD)


@kernel
def _prefill_fold(
    query_start: tl.tensor,
    positions: tl.tensor,
    part_m: tl.tensor,
    part_l: tl.tensor,
    part_acc: tl.tensor,
    out: tl.tensor,
    num_sequences: tl.tensor,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    sequence, index = find_tile(query_start, tl.program_id(0), num_sequences, 1)
    start = tl.load(query_start + sequence)
    stop = tl.load(query_start + sequence + 1)
    token = start + index
    if (stop - start == 1) | (token >= stop):
        return
    position = tl.load(positions + token)
    count = position // split_length(position, SPLIT, MOST) + 1
    store_folded(
        part_m,
        part_l,
        part_acc,
        out,
        token,
        token,
        count,
        Q_HEADS,
        HEAD_DIM,
        HEADS,
        BLOCK_D,
        MOST,
    )


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
    num_tokens, q_heads, dim = q_TND.shape
    kv_heads = kv.spec.num_kv_heads
    group = q_heads // kv_heads
    blocks = blocks.prefill
    tiles = num_tokens // (power_of_two(group, blocks.block_m) // group) + num_sequences
    lanes = programs_per_tile(num_tokens, q_heads, kv.spec, batch, mask, blocks)
    parts = empty_parts(num_tokens, q_TND, blocks) if lanes > 1 else (None, None, None)
    _prefill[(tiles, kv_heads, lanes)](
        q_TND,
        batch.query_start_S1,
        batch.positions_T,
        batch.block_table_SB,
        kv.data[kv_layer],
        None if kv.scales is None else kv.scales[kv_layer],
        out_TND,
        *parts,
        num_sequences,
        lanes,
        q_TND.stride(0),
        q_TND.stride(1),
        batch.block_table_SB.stride(0),
        scale / math.log(2),
        span_of(mask),
        mask.sinks,
        SHARED=lanes > 1,
        **options(kv.spec, group, blocks, mask),
    )
    if lanes > 1:
        _prefill_fold[(num_tokens + num_sequences, -(-q_heads // heads_per_fold(q_heads)))](
            batch.query_start_S1,
            batch.positions_T,
            *parts,
            out_TND,
            num_sequences,
            **fold_options(q_heads, dim, blocks),
        )


def programs_per_tile(
    num_tokens: int,
    q_heads: int,
    kv: KVCacheSpec,
    batch: FlatBatch,
    mask: AttentionMaskSpec,
    blocks: AttentionBlocks,
) -> int:
    """Programs that share the keys of a tile; 1 where tiles alone fill the GPU.

    The bits of a row do not depend on the choice. Windows and chunks have few keys for each query,
    and are not shared.

    Args:
        num_tokens: tokens of the batch.
        q_heads: number of query heads.
        kv: shape of the cache.
        batch: the batch.
        mask: keys that a query attends to.
        blocks: block sizes of a prefill.
    """
    parts_nbytes = num_tokens * q_heads * blocks.most_splits * (kv.head_dim + 2) * 4
    if mask != FULL_ATTENTION or parts_nbytes > PARTS_NBYTES:
        return 1
    # The host knows the longest sequence of new tokens alone. Each further prompt has 2 at least.
    # In a half of a step the longest is no more than that, and sequences may have none.
    num_sequences = batch.context_S.shape[0]
    beyond = max(1, num_tokens - num_sequences)
    longest = min(batch.max_query, beyond + 1)
    prompts = min(num_sequences, beyond - longest + 2)
    group = q_heads // kv.num_kv_heads
    tokens = power_of_two(group, blocks.block_m) // group
    programs = ((beyond + prompts) // tokens + prompts) * kv.num_kv_heads
    if 2 * programs > FULL_GPU:
        return 1
    splits = min(blocks.most_splits, -(-batch.max_context // blocks.split))
    return min(splits, PROGRAMS // programs)

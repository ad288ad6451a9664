"""Attention of sequences with a single query: programs take splits of the context, then fold them.

The length of splits is `softmax.split_length`, a function of the query's position. A program takes
every num_lanes-th split of a (sequence, key/value head), so that the size of a launch does not
depend on contexts, and a captured graph serves all contexts. Knows splits; knows nothing of layers.
Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import math

from torch import Tensor

import triton.language as tl
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import kernel
from arriero.kernels.triton.softmax import (
    attend_keys,
    empty_parts,
    first_seen,
    fold_options,
    heads_per_fold,
    leading_splits,
    mask_flags,
    options,
    span_of,
    split_length,
    store_folded,
)
from arriero.kernels.triton.tuning import AttentionBlocks
from arriero.kernels.triton.widen import scaled_queries

PROGRAMS = 1024
"""Largest number of programs; enough to fill a GPU several times."""


@kernel
def _decode_splits(
    q: tl.tensor,
    query_start: tl.tensor,
    positions: tl.tensor,
    tables: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    part_m: tl.tensor,
    part_l: tl.tensor,
    part_acc: tl.tensor,
    q_stride: tl.tensor,
    q_head_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    span: tl.tensor,
    sinks: tl.tensor,
    num_lanes: tl.tensor,
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
) -> None:
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    token = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    position = tl.load(positions + token)
    lowest = first_seen(position, span, CHUNKED, WINDOWED)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    valid_MD = (row < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    head = kv_head * GROUP + row
    at_MD = q + token.to(tl.int64) * q_stride + head[:, None] * q_head_stride + d[None, :]
    q_MD, scale_M = scaled_queries(tl.load(at_MD, mask=valid_MD, other=0.0), scale, QK)
    first_M = tl.where(row < GROUP, lowest, 1)  # rows without a key: the compiler leaves half out
    last_M = tl.where(row < GROUP, position, 0)
    table = tables + sequence.to(tl.int64) * table_stride
    length = split_length(position, SPLIT, MOST)
    first_split = lowest // length
    leading = leading_splits(first_split, length, sinks, SINKS)
    count = leading + position // length + 1 - first_split
    for i in range(tl.program_id(2), count, num_lanes):
        split = first_split + i
        if SINKS:
            split = tl.where(i < leading, i, split - leading)
        m_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_M = tl.zeros([BLOCK_M], tl.float32)
        acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m_M, l_M, acc_MD = attend_keys(
            q_MD,
            first_M,
            last_M,
            split,
            length,
            lowest,
            position,
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
        line = (sequence.to(tl.int64) * (KV_HEADS * GROUP) + head) * MOST + i
        tl.store(part_m + line, m_M, mask=row < GROUP)
        tl.store(part_l + line, l_M, mask=row < GROUP)
        tl.store(part_acc + line[:, None] * HEAD_DIM + d[None, :], acc_MD, mask=valid_MD)


@kernel
def _decode_fold(
    query_start: tl.tensor,
    positions: tl.tensor,
    part_m: tl.tensor,
    part_l: tl.tensor,
    part_acc: tl.tensor,
    out: tl.tensor,
    span: tl.tensor,
    sinks: tl.tensor,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    MOST: tl.constexpr,
    CHUNKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    sequence = tl.program_id(0)
    token = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - token != 1:
        return
    position = tl.load(positions + token)
    length = split_length(position, SPLIT, MOST)
    first_split = first_seen(position, span, CHUNKED, WINDOWED) // length
    count = position // length + 1 - first_split
    count += leading_splits(first_split, length, sinks, SINKS)
    store_folded(
        part_m,
        part_l,
        part_acc,
        out,
        sequence,
        token,
        count,
        Q_HEADS,
        HEAD_DIM,
        HEADS,
        BLOCK_D,
        MOST,
    )


def attend_decodes(
    q_TND: Tensor,
    out_TND: Tensor,
    scale: float,
    kv: TritonKVCache,
    kv_layer: int,
    batch: FlatBatch,
    mask: AttentionMaskSpec,
    blocks: AttentionBlocks,
) -> None:
    """Fill the rows of `out` that belong to sequences with a single query."""
    num_sequences = batch.context_S.shape[0]
    _, q_heads, dim = q_TND.shape
    kv_heads = kv.spec.num_kv_heads
    group = q_heads // kv_heads
    splits = min(blocks.most_splits, -(-batch.max_context // blocks.split))
    lanes = min(splits, max(1, PROGRAMS // (num_sequences * kv_heads)))
    part_m, part_l, part_acc = empty_parts(num_sequences, q_TND, blocks)
    _decode_splits[(num_sequences, kv_heads, lanes)](
        q_TND,
        batch.query_start_S1,
        batch.positions_T,
        batch.block_table_SB,
        kv.data[kv_layer],
        None if kv.scales is None else kv.scales[kv_layer],
        part_m,
        part_l,
        part_acc,
        q_TND.stride(0),
        q_TND.stride(1),
        batch.block_table_SB.stride(0),
        scale / math.log(2),
        span_of(mask),
        mask.sinks,
        lanes,
        **options(kv.spec, group, blocks, mask),
    )
    _decode_fold[(num_sequences, -(-q_heads // heads_per_fold(q_heads)))](
        batch.query_start_S1,
        batch.positions_T,
        part_m,
        part_l,
        part_acc,
        out_TND,
        span_of(mask),
        mask.sinks,
        **mask_flags(mask),
        **fold_options(q_heads, dim, blocks),
    )

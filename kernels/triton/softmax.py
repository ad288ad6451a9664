"""The arithmetic that all attention kernels share, so that all give the same bits.

Tiles of keys begin at multiples of BLOCK_N, splits of tiles begin at multiples of the row's split
length, and splits are folded in order. All three depend on the position of the row alone: neither
on the batch, nor on the chunks of a prompt. Online softmax: Milakov and Gimelshein, 2018; split
over keys: Dao and others, "Flash-Decoding", 2023. Knows rows and keys; knows nothing of batches.

Shape legend: M rows of a tile (queries times heads of a group), C keys of a tile, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.kv_cache import KVCacheSpec
from arriero.kernels.triton.launch import EXACT, INTERPRETED, kernel, power_of_two
from arriero.kernels.triton.tuning import AttentionBlocks
from arriero.kernels.triton.widen import product_types, widen

_DOUBLINGS = tl.constexpr(16)
_FOLD_HEADS = 4
_FLOAT16_BITS = tl.constexpr(15.0)
"""Weights in float16 go up to 2**15, so that those down to 2**-29 of the greatest keep all bits."""


@kernel
def split_length(position: tl.tensor, SPLIT: tl.constexpr, MOST: tl.constexpr) -> tl.tensor:
    """Keys in each split of a row at `position`: its context has at most MOST splits."""
    length = position * 0 + SPLIT
    for _ in tl.static_range(_DOUBLINGS):
        length = tl.where((position + MOST) // MOST > length, length * 2, length)
    return length


@kernel
def first_seen(
    position: tl.tensor, span: tl.tensor, CHUNKED: tl.constexpr, WINDOWED: tl.constexpr
) -> tl.tensor:
    """The first key that a row at `position` attends to, sinks aside; `span` is of `span_of`."""
    first = position * 0
    if CHUNKED:
        first = position // span * span
    if WINDOWED:
        first = tl.maximum(position - span + 1, 0)
    return first


@kernel
def leading_splits(
    first_split: tl.tensor, length: tl.tensor, sinks: tl.tensor, SINKS: tl.constexpr
) -> tl.tensor:
    """Number of splits before `first_split` with keys among the first `sinks`."""
    leading = first_split * 0
    if SINKS:
        leading = tl.minimum(first_split, (sinks + length - 1) // length)
    return leading


@kernel
def attend_tile(
    q_MD: tl.tensor,
    first_M: tl.tensor,
    last_M: tl.tensor,
    key: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    sinks: tl.tensor,
    table: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    kv_head: tl.tensor,
    scale_M: tl.tensor,
    m_M: tl.tensor,
    l_M: tl.tensor,
    acc_MD: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
    KV_INT8: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
) -> tl.tensor:
    """Add keys key .. key + BLOCK_N to the running maximum, sum and weighted values.

    Row r attends to keys first[r] .. last[r]; only keys lowest .. highest are read. With SINKS the
    first `sinks` keys are read too, up to the last key of the row and `highest`. `scale_M` has a
    factor log2(e), so that the exponentials are powers of two.
    """
    key_C = key + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    read_C = (key_C >= lowest) & (key_C <= highest)
    if SINKS:
        read_C |= (key_C < sinks) & (key_C <= highest)
    block_C = tl.load(table + key_C // BLOCK_SIZE, mask=read_C, other=0).to(tl.int64)
    line_C = (block_C * (2 * KV_HEADS) + kv_head) * BLOCK_SIZE + key_C % BLOCK_SIZE
    read_CD = read_C[:, None] & (d < HEAD_DIM)[None, :]
    at_CD = cache + line_C[:, None] * HEAD_DIM + d[None, :]
    k_CD = widen(tl.load(at_CD, mask=read_CD, other=0.0), QK)
    values_CD = at_CD + KV_HEADS * BLOCK_SIZE * HEAD_DIM
    v_CD = widen(tl.load(values_CD, mask=read_CD, other=0.0), PV)
    score_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee") * scale_M[:, None]
    if KV_INT8:
        # Both scales in one load: a smaller load would be repeated, addresses and all, by each
        # thread that needs a number of it.
        at_C2 = line_C[:, None] + (tl.arange(0, 2) * (KV_HEADS * BLOCK_SIZE))[None, :]
        scale_C2 = tl.load(scales + at_C2, mask=read_C[:, None], other=0.0)
        k_scale_C, v_scale_C = tl.split(scale_C2)
        score_MC *= k_scale_C[None, :]
    seen_MC = (key_C[None, :] >= first_M[:, None]) & (key_C[None, :] <= last_M[:, None])
    if SINKS:
        seen_MC |= (key_C[None, :] < sinks) & (key_C[None, :] <= last_M[:, None])
    score_MC = tl.where(seen_MC, score_MC, -float("inf"))
    new_M = tl.maximum(m_M, tl.max(score_MC, 1))
    base_M = tl.where(new_M == -float("inf"), 0.0, new_M)
    shrink_M = tl.exp2(m_M - base_M)
    if PV == tl.float16:
        base_M -= _FLOAT16_BITS
    p_MC = tl.exp2(score_MC - base_M[:, None])
    l_M = l_M * shrink_M + tl.sum(p_MC, 1)
    if KV_INT8:
        p_MC *= v_scale_C[None, :]
    acc_MD = tl.dot(p_MC.to(PV), v_CD, acc_MD * shrink_M[:, None], input_precision="ieee")
    return new_M, l_M, acc_MD


@kernel
def attend_keys(
    q_MD: tl.tensor,
    first_M: tl.tensor,
    last_M: tl.tensor,
    split: tl.tensor,
    length: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    sinks: tl.tensor,
    table: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    kv_head: tl.tensor,
    scale_M: tl.tensor,
    m_M: tl.tensor,
    l_M: tl.tensor,
    acc_MD: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
    KV_INT8: tl.constexpr,
    QK: tl.constexpr,
    PV: tl.constexpr,
) -> tl.tensor:
    """Add the keys of split number `split`, each split of `length` keys; see `attend_tile`."""
    begin = tl.maximum(split * length, lowest // BLOCK_N * BLOCK_N)
    end = tl.minimum((split + 1) * length, highest + 1)
    start = begin
    if SINKS:  # tiles with sinks come before the other tiles
        begin = tl.minimum(begin, end)
        num_sinks = tl.maximum(tl.minimum(begin, sinks) - split * length, 0)
        start = begin - (num_sinks + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    for at in range(start, end, BLOCK_N):
        key = at
        if SINKS:
            key = tl.where(at < begin, at - start + split * length, at)
        m_M, l_M, acc_MD = attend_tile(
            q_MD,
            first_M,
            last_M,
            key,
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
    return m_M, l_M, acc_MD


@kernel
def fold(
    m: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    m2: tl.tensor,
    total2: tl.tensor,
    acc2: tl.tensor,
) -> tl.tensor:
    """Merge two parts of a row's softmax; an empty second part (maximum -inf) changes no bit."""
    new = tl.maximum(m, m2)
    base = tl.where(new == -float("inf"), 0.0, new)
    a, b = tl.exp2(m - base), tl.exp2(m2 - base)
    return new, total * a + total2 * b, acc * a[:, None] + acc2 * b[:, None]


@kernel
def store_folded(
    part_m: tl.tensor,
    part_l: tl.tensor,
    part_acc: tl.tensor,
    out: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    count: tl.tensor,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """Fold the first `count` splits of a row of the parts in order, and store them at `token`.

    A program does HEADS heads; parts have the shapes of `empty_parts`.
    """
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    valid = head < Q_HEADS
    valid_MD = valid[:, None] & (d < HEAD_DIM)[None, :]
    m_M = tl.full([HEADS], -float("inf"), tl.float32)
    l_M = tl.zeros([HEADS], tl.float32)
    acc_MD = tl.zeros([HEADS, BLOCK_D], tl.float32)
    line = (row.to(tl.int64) * Q_HEADS + head) * MOST
    for i in range(0, count):
        at = line + i
        m2_M = tl.load(part_m + at, mask=valid, other=-float("inf"))
        l2_M = tl.load(part_l + at, mask=valid, other=0.0)
        at_MD = part_acc + at[:, None] * HEAD_DIM + d[None, :]
        acc2_MD = tl.load(at_MD, mask=valid_MD, other=0.0)
        m_M, l_M, acc_MD = fold(m_M, l_M, acc_MD, m2_M, l2_M, acc2_MD)
    to = out + (token.to(tl.int64) * Q_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(to, quotient(acc_MD, l_M).to(out.dtype.element_ty), mask=valid_MD)


@kernel
def quotient(acc: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Weighted values over the sum of weights; 0 for a row without keys."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]


def empty_parts(rows: int, q_TND: Tensor, blocks: AttentionBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum and weighted values of the splits of rows: float32 [R, N, splits(, D)]."""
    _, heads, dim = q_TND.shape
    shape = (rows, heads, blocks.most_splits)
    part_m = torch.empty(shape, dtype=torch.float32, device=q_TND.device)
    part_acc = torch.empty(*shape, dim, dtype=torch.float32, device=q_TND.device)
    return part_m, torch.empty_like(part_m), part_acc


def fold_options(q_heads: int, dim: int, blocks: AttentionBlocks) -> dict[str, Any]:
    """Compile-time constants and launch options of the kernels that fold."""
    return {
        "Q_HEADS": q_heads,
        "HEAD_DIM": dim,
        "HEADS": heads_per_fold(q_heads),
        "BLOCK_D": power_of_two(dim, 16),
        "SPLIT": blocks.split,
        "MOST": blocks.most_splits,
        "num_warps": 4,
        **EXACT,
    }


def heads_per_fold(q_heads: int) -> int:
    """Heads of a program that folds; all of them in the interpreter, where a program is slow."""
    return power_of_two(q_heads) if INTERPRETED else _FOLD_HEADS


def span_of(mask: AttentionMaskSpec) -> int:
    """Size of the window or the chunk, which limits how far back a row attends; 0 for no limit."""
    return mask.window or mask.chunk_size


def mask_flags(mask: AttentionMaskSpec) -> dict[str, bool]:
    """Compile-time constants of a mask."""
    return {
        "CHUNKED": mask.chunk_size > 0,
        "WINDOWED": mask.window > 0,
        "SINKS": mask.sinks > 0,
    }


def options(
    kv: KVCacheSpec, group: int, blocks: AttentionBlocks, mask: AttentionMaskSpec
) -> dict[str, Any]:
    """Compile-time constants and launch options, the same for all attention kernels.

    Args:
        kv: shape and dtype of the cache.
        group: query heads that share a key/value head.
        blocks: block sizes.
        mask: keys that a row attends to.
    """
    return {
        "KV_HEADS": kv.num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": kv.head_dim,
        "BLOCK_SIZE": kv.block_size,
        "BLOCK_M": power_of_two(group, blocks.block_m),
        "BLOCK_N": blocks.block_n,
        "BLOCK_D": power_of_two(kv.head_dim, 16),
        "SPLIT": blocks.split,
        "MOST": blocks.most_splits,
        **mask_flags(mask),
        "KV_INT8": kv.dtype == torch.int8,
        **product_types(kv.dtype),
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        **EXACT,
    }

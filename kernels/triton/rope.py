"""Rotary position embedding, QK norm, query scale, and the write of keys and values to the cache.

A program takes some heads of a token: queries go to a tensor, keys and values to the cache. Knows
heads and slots; knows nothing of sequences. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton.language as tl
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.layers import DenseLayer
from arriero.kernels.quantized_weight import FP8_MAX
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import EXACT, INTERPRETED, kernel, power_of_two, unit_stride

HEADS = 8
"""Heads of a token for each program."""
_ROUNDER = tl.constexpr(1.5 * 2.0**23)
_FP8_MAX = tl.constexpr(FP8_MAX)


@kernel
def _rope_write_kv(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    queries: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    qkv_stride: tl.tensor,
    block_size: tl.tensor,
    eps: tl.tensor,
    gain: tl.tensor,
    floor: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    ROPE: tl.constexpr,
    NORMS: tl.constexpr,
    SCALES_QUERY: tl.constexpr,
    KV_INT8: tl.constexpr,
    KV_FP8: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    i = tl.arange(0, HALF)[None, :]
    half = HEAD_DIM // 2
    valid = (head < Q_HEADS + 2 * KV_HEADS) & (i < half)
    if ROPE == "pairs":
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + half
    at = qkv + token * qkv_stride + head * HEAD_DIM
    a = tl.load(at + first, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(at + second, mask=valid, other=0.0).to(tl.float32)
    has_position = head < Q_HEADS + KV_HEADS
    if ROPE != "none":
        c = tl.load(cos + token * half + i, mask=i < half, other=0.0)
        s = tl.load(sin + token * half + i, mask=i < half, other=0.0)
        rotated = a * c - b * s
        b = tl.where(has_position, b * c + a * s, b)
        a = tl.where(has_position, rotated, a)
    if NORMS:
        mean = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM
        shrink = tl.where(has_position, tl.rsqrt(mean + eps)[:, None], 1.0)
        a, b = a * shrink, b * shrink
    a, b = a.to(qkv.dtype.element_ty), b.to(qkv.dtype.element_ty)

    query_a, query_b = a, b
    if SCALES_QUERY:
        steps = tl.floor((tl.load(positions + token).to(tl.float32) + 1.0) / floor)
        factor = tl.log(1.0 + steps) * gain + 1.0
        query_a = (a.to(tl.float32) * factor).to(a.dtype)
        query_b = (b.to(tl.float32) * factor).to(b.dtype)
    is_query = valid & (head < Q_HEADS)
    to = queries + (token * Q_HEADS + head) * HEAD_DIM
    tl.store(to + first, query_a, mask=is_query)
    tl.store(to + second, query_b, mask=is_query)

    is_cached = valid & (head >= Q_HEADS)
    slot = tl.load(slots + token)
    line = (slot // block_size).to(tl.int64) * (2 * KV_HEADS) + (head - Q_HEADS)
    line = line * block_size + slot % block_size
    if KV_INT8:
        a, b = a.to(tl.float32), b.to(tl.float32)
        greatest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))[:, None]
        scale = tl.div_rn(greatest, tl.full(greatest.shape, 127.0, tl.float32))
        divisor = tl.where(scale > 0, scale, 1.0)
        a, b = _level(a, divisor), _level(b, divisor)
        tl.store(scales + line, scale, mask=(head >= Q_HEADS) & (head < Q_HEADS + 2 * KV_HEADS))
    elif KV_FP8:
        a = tl.minimum(tl.maximum(a.to(tl.float32), -_FP8_MAX), _FP8_MAX)
        b = tl.minimum(tl.maximum(b.to(tl.float32), -_FP8_MAX), _FP8_MAX)
    stored = cache.dtype.element_ty
    tl.store(cache + line * HEAD_DIM + first, a.to(stored), mask=is_cached)
    tl.store(cache + line * HEAD_DIM + second, b.to(stored), mask=is_cached)


@kernel
def _level(x: tl.tensor, divisor: tl.tensor) -> tl.tensor:
    """The nearest of 127 levels of either sign; ties go to the even level."""
    level = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    # A sum with 1.5 * 2**23 has no bit for a fraction: it is rounded half to even.
    level = (level + _ROUNDER) - _ROUNDER
    return tl.minimum(tl.maximum(level, -127.0), 127.0)


def rope_write_kv(
    qkv_TE: Tensor, layer: DenseLayer, kv: TritonKVCache, kv_layer: int, batch: FlatBatch
) -> Tensor:
    """See `Ops.rope_write_kv`."""
    qkv_TE = unit_stride(qkv_TE)
    tokens, dim = qkv_TE.shape[0], layer.head_dim
    q_TND = torch.empty(tokens, layer.num_q_heads, dim, dtype=qkv_TE.dtype, device=qkv_TE.device)
    total = layer.num_q_heads + 2 * layer.num_kv_heads
    heads = power_of_two(total) if INTERPRETED else HEADS
    style = layer.style
    gain, floor = style.query_scale or (0.0, 1.0)
    if tokens:
        _rope_write_kv[(tokens, -(-total // heads))](
            qkv_TE,
            batch.cos_TD,
            batch.sin_TD,
            batch.positions_T,
            batch.slots_T,
            q_TND,
            kv.data[kv_layer],
            None if kv.scales is None else kv.scales[kv_layer],
            qkv_TE.stride(0),
            kv.spec.block_size,
            layer.eps,
            gain,
            floor,
            Q_HEADS=layer.num_q_heads,
            KV_HEADS=layer.num_kv_heads,
            HEAD_DIM=dim,
            HALF=power_of_two(dim // 2),
            HEADS=heads,
            ROPE=style.rope,
            NORMS=style.qk_norm,
            SCALES_QUERY=style.query_scale is not None,
            KV_INT8=kv.spec.dtype == torch.int8,
            KV_FP8=kv.spec.dtype == torch.float8_e4m3fn,
            num_warps=4,
            **EXACT,
        )
    return q_TND

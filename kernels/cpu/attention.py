"""The attention ops in C++: RoPE with the write of keys and values, and attention over the cache.

Knows queries, caches and batches; knows nothing of weights.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.cpu.structs import (
    add_head_norms,
    bare_layer_struct,
    batch_struct,
    cache_of,
    check_cache,
    float_rows,
    mask_struct,
)
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layers import DenseLayer

if TYPE_CHECKING:
    from arriero.kernels.cpu.backend import CpuOps


def rope_write_kv(
    ops: CpuOps,
    qkv_TE: Tensor,
    layer: DenseLayer,
    kv: KVCache,
    kv_layer: int,
    batch: FlatBatch,
) -> Tensor:
    """See `Ops.rope_write_kv`; works on a copy of `qkv_TE`."""
    check_cache(layer, kv)
    width = (layer.num_q_heads + 2 * layer.num_kv_heads) * layer.head_dim
    qkv_TE = float_rows("rope_write_kv", qkv_TE, width).clone(memory_format=torch.contiguous_format)
    c_batch = batch_struct(batch, qkv_TE.shape[0], layer.head_dim)
    c_layer = bare_layer_struct(layer)
    _references = add_head_norms(c_layer, layer)
    ops.call(
        "rope_write",
        qkv_TE.data_ptr(),
        width,
        ctypes.addressof(c_layer),
        cache_of(kv).address,
        kv_layer,
        ctypes.addressof(c_batch),
    )
    num_q = layer.num_q_heads * layer.head_dim
    q_TND: Tensor = qkv_TE[:, :num_q].view(-1, layer.num_q_heads, layer.head_dim)
    return q_TND


def paged_attention(
    ops: CpuOps,
    q_TND: Tensor,
    scale: float,
    kv: KVCache,
    kv_layer: int,
    batch: FlatBatch,
    mask: AttentionMaskSpec,
) -> Tensor:
    """See `Ops.paged_attention`."""
    num_tokens, num_heads, head_dim = q_TND.shape
    spec = kv.spec
    if head_dim != spec.head_dim or num_heads % spec.num_kv_heads:
        raise ValueError(
            f"queries of {num_heads} heads of {head_dim} do not fit a cache of "
            f"{spec.num_kv_heads} heads of {spec.head_dim}"
        )
    q_TE = float_rows("paged_attention", q_TND.flatten(1), num_heads * head_dim)
    out_TE = torch.empty(num_tokens, num_heads * head_dim)
    c_batch, c_mask = batch_struct(batch, num_tokens, head_dim), mask_struct(mask)
    ops.call(
        "paged_attention",
        q_TE.data_ptr(),
        q_TE.stride(0),
        num_heads,
        scale,
        ctypes.addressof(c_mask),
        cache_of(kv).address,
        kv_layer,
        ctypes.addressof(c_batch),
        out_TE.data_ptr(),
    )
    return out_TE

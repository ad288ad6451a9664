"""RoPE and attention over the paged cache, in plain torch.

Knows blocks and slots; knows nothing of their owners. Shape legend: kernels/ops.py, and
    G  query heads that share a key/value head      Q  queries of a sequence
    C  keys gathered from a sequence's blocks
"""

from __future__ import annotations

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layers import DenseLayer
from arriero.kernels.reference.kv import ReferenceKVCache


def rope_write_kv(
    qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
) -> Tensor:
    """Rotate q and k by halves, write k and v to their slots; returns q [T, N, D]."""
    assert isinstance(kv, ReferenceKVCache), "a cache belongs to the backend that made it"
    heads = [layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads]
    q_TND, k_TKD, v_TKD = torch.split(qkv_TE.reshape(-1, sum(heads), layer.head_dim), heads, dim=1)
    q_TND, k_TKD = (_encode(x, layer, batch) for x in (q_TND, k_TKD))
    if layer.style.query_scale is not None:
        gain, floor = layer.style.query_scale
        step_T = torch.floor((batch.positions_T.float() + 1) / floor)
        q_TND = (q_TND.float() * (torch.log1p(step_T) * gain + 1)[:, None, None]).to(q_TND.dtype)
    kv.store(kv_layer, k_TKD, v_TKD, batch.slots_T)
    return q_TND


def _encode(x_TND: Tensor, layer: DenseLayer, batch: FlatBatch) -> Tensor:
    """RoPE, then the QK norm, float32 inside."""
    x32_TND = x_TND.float()
    if layer.style.rope != "none":
        x32_TND = _rotate(x32_TND, batch.cos_TD, batch.sin_TD, layer.style.rope == "pairs")
    if layer.style.qk_norm:
        mean_TN1 = x32_TND.pow(2).mean(-1, keepdim=True)
        x32_TND = x32_TND * torch.rsqrt(mean_TN1 + layer.eps)
    return x32_TND.to(x_TND.dtype)


def _rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, pairs: bool) -> Tensor:
    """Rotate pairs of elements: (2i, 2i + 1) with `pairs`, else (i, i + D / 2)."""
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    a, b = (x_TND[..., ::2], x_TND[..., 1::2]) if pairs else x_TND.chunk(2, dim=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(rotated, dim=-1).flatten(-2) if pairs else torch.cat(rotated, dim=-1)


def paged_attention(
    q_TND: Tensor,
    scale: float,
    kv: KVCache,
    kv_layer: int,
    batch: FlatBatch,
    mask: AttentionMaskSpec,
) -> Tensor:
    """Causal attention of each token within `mask` over the blocks of its sequence: [T, N * D].

    Sequences with a single query (decodes) form a batch, padded to the longest; each other sequence
    runs alone.
    """
    assert isinstance(kv, ReferenceKVCache), "a cache belongs to the backend that made it"
    out_TND = torch.empty_like(q_TND)
    starts = batch.query_start_S1.tolist()
    contexts = batch.context_S.tolist()
    single = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] == 1]
    groups = [[s] for s in range(len(contexts)) if starts[s + 1] - starts[s] > 1]
    if single:
        groups.append(single)
    size = kv.spec.block_size
    for group in groups:
        tokens_SQ = torch.tensor(
            [range(starts[s], starts[s + 1]) for s in group], device=q_TND.device
        )
        position_SQ = batch.positions_T[tokens_SQ].long()
        first_SQ = _first(position_SQ, mask)
        num_blocks = -(-max(contexts[s] for s in group) // size)
        # Table entries past a sequence's context, or before the first key of its first query, are
        # arbitrary: read block 0 instead, and mask its keys.
        key_B = torch.arange(num_blocks, device=q_TND.device) * size
        valid_SB = key_B < batch.context_S[group, None]
        valid_SB &= (key_B + size > first_SQ[:, :1]) | (key_B < mask.sinks)
        blocks_SB = batch.block_table_SB[group, :num_blocks].long().where(valid_SB, 0)
        out_TND[tokens_SQ] = _attend(
            q_TND[tokens_SQ],
            kv.gather(kv_layer, blocks_SB),
            first_SQ,
            position_SQ,
            mask.sinks,
            scale,
        )
    return out_TND.flatten(1)


def _first(position_SQ: Tensor, mask: AttentionMaskSpec) -> Tensor:
    """`AttentionMaskSpec.first` of each position."""
    if mask.chunk_size:
        return position_SQ // mask.chunk_size * mask.chunk_size
    if mask.window:
        return (position_SQ - mask.window + 1).clamp(min=0)
    return position_SQ * 0


def _attend(
    q_SQND: Tensor,
    kv_2SBKPD: Tensor,
    first_SQ: Tensor,
    last_SQ: Tensor,
    sinks: int,
    scale: float,
) -> Tensor:
    """Softmax attention in float32: [S, Q, N, D] of the queries' dtype.

    Query q attends to keys first[q] .. last[q], and to keys up to last[q] among the first `sinks`.
    """
    num_seqs, num_queries, num_heads, head_dim = q_SQND.shape
    num_kv_heads = kv_2SBKPD.shape[3]
    k_SKCD, v_SKCD = kv_2SBKPD.transpose(2, 3).flatten(3, 4)
    key_C = torch.arange(k_SKCD.shape[2], device=q_SQND.device)
    seen_SQC = (key_C >= first_SQ[..., None]) | (key_C < sinks)
    seen_SQC &= key_C <= last_SQ[..., None]
    # A slot outside the mask of all queries may contain NaN, and NaN * 0 is NaN.
    v_SKCD = v_SKCD.masked_fill(~seen_SQC.any(1)[:, None, :, None], 0)
    # The G heads of a group read the same keys: a single product [G * Q, D] x [D, C] for all heads.
    q_SNQD = q_SQND.float().transpose(1, 2)
    q_SKgD = q_SNQD.reshape(num_seqs, num_kv_heads, -1, head_dim)
    scores_SNQC = (q_SKgD @ k_SKCD.transpose(-1, -2) * scale).view(
        num_seqs, num_heads, num_queries, -1
    )
    weights_SNQC = scores_SNQC.masked_fill(~seen_SQC[:, None], -torch.inf).softmax(-1)
    out_SKgD = weights_SNQC.view(num_seqs, num_kv_heads, q_SKgD.shape[2], -1) @ v_SKCD
    out_SQND: Tensor = out_SKgD.view_as(q_SNQD).transpose(1, 2)
    return out_SQND.to(q_SQND.dtype)

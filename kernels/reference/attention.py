"""The paged cache, RoPE and attention over it, in plain torch.

Knows blocks and slots; refuses to know who owns them. Shape legend: kernels/ops.py, and
    G  query heads that share a key/value head      Q  queries of one sequence
    C  keys gathered from a sequence's blocks
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels.ops import DenseLayer, FlatBatch, KVCache, KVCacheSpec


class ReferenceKVCache(KVCache):
    """One tensor [layers, 2 (k, v), blocks, K, P, D]."""

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self.spec = spec
        self.data = torch.zeros(
            spec.num_layers,
            2,
            spec.num_blocks,
            spec.num_kv_heads,
            spec.block_size,
            spec.head_dim,
            dtype=spec.dtype,
            device=device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated, exactly."""
        return self.data.nbytes

    def read(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """Copy blocks out in the canonical layout [len(blocks), 2 (k, v), K, P, D]."""
        return self.data[layer][:, self._index(blocks)].transpose(0, 1).contiguous()

    def write(self, layer: int, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in from the canonical layout."""
        self.data[layer][:, self._index(blocks)] = data.to(self.data).transpose(0, 1)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.long, device=self.data.device)


def rope_write_kv(
    qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
) -> Tensor:
    """Rotate q and k by halves, write k and v to their slots; returns q [T, N, D]."""
    assert isinstance(kv, ReferenceKVCache), "a cache belongs to the backend that made it"
    heads = [layer.num_q_heads, layer.num_kv_heads, layer.num_kv_heads]
    q_TND, k_TKD, v_TKD = torch.split(qkv_TE.reshape(-1, sum(heads), layer.head_dim), heads, dim=1)
    k_TKD = _rotate_halves(k_TKD, batch.cos_TD, batch.sin_TD)
    write_slots(kv.data[kv_layer], k_TKD, v_TKD, batch.slots_T)
    return _rotate_halves(q_TND, batch.cos_TD, batch.sin_TD)


def write_slots(data: Tensor, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor) -> None:
    """Store each token's key and value in a layer's cache [2, blocks, K, P, D]."""
    size = data.shape[3]
    block_T, offset_T = slots_T.long() // size, slots_T.long() % size
    data[0][block_T, :, offset_T] = k_TKD.to(data.dtype)
    data[1][block_T, :, offset_T] = v_TKD.to(data.dtype)


def _rotate_halves(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Element i pairs with i + D / 2; float32 inside."""
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    a, b = x_TND.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_TND.dtype)


def paged_attention(
    q_TND: Tensor, scale: float, kv: KVCache, kv_layer: int, batch: FlatBatch
) -> Tensor:
    """Causal attention over each sequence's blocks: [T, N * D].

    Sequences with one query (decodes) go together, padded to the longest; the others one by one.
    """
    assert isinstance(kv, ReferenceKVCache), "a cache belongs to the backend that made it"
    out_TND = torch.empty_like(q_TND)
    starts = batch.query_start_S1.tolist()
    contexts = batch.context_S.tolist()
    single = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] == 1]
    groups = [[s] for s in range(len(contexts)) if starts[s + 1] - starts[s] > 1]
    if single:
        groups.append(single)
    data = kv.data[kv_layer]
    size = kv.spec.block_size
    for group in groups:
        tokens_SQ = torch.tensor(
            [range(starts[s], starts[s + 1]) for s in group], device=q_TND.device
        )
        num_blocks = -(-max(contexts[s] for s in group) // size)
        blocks_SB = batch.block_table_SB[group, :num_blocks].long()
        # Entries past a sequence's own context are arbitrary: read block 0 there, then mask.
        own = torch.arange(num_blocks, device=q_TND.device) * size
        context_S = batch.context_S[group].long()
        blocks_SB = blocks_SB.where(own < context_S[:, None], 0)
        out_TND[tokens_SQ] = _attend(
            q_TND[tokens_SQ], data[:, blocks_SB], batch.positions_T[tokens_SQ], context_S, scale
        )
    return out_TND.flatten(1)


def _attend(
    q_SQND: Tensor, kv_2SBKPD: Tensor, position_SQ: Tensor, context_S: Tensor, scale: float
) -> Tensor:
    """Softmax attention in float32: [S, Q, N, D] of the queries' dtype."""
    num_seqs, num_queries, num_heads, head_dim = q_SQND.shape
    num_kv_heads = kv_2SBKPD.shape[3]
    k_SKCD, v_SKCD = kv_2SBKPD.transpose(2, 3).flatten(3, 4).float()
    key_C = torch.arange(k_SKCD.shape[2], device=q_SQND.device)
    # Slots never written may hold anything, NaN too, and NaN * 0 is NaN.
    unwritten = (key_C >= context_S[:, None])[:, None, :, None]
    v_SKCD = v_SKCD.masked_fill(unwritten, 0)
    # The G heads of a group read the same keys: one product [G * Q, D] x [D, C] for all of them.
    q_SNQD = q_SQND.float().transpose(1, 2)
    q_SKgD = q_SNQD.reshape(num_seqs, num_kv_heads, -1, head_dim)
    scores_SNQC = (q_SKgD @ k_SKCD.transpose(-1, -2) * scale).view(
        num_seqs, num_heads, num_queries, -1
    )
    hidden_SQC = key_C > position_SQ[:, :, None]
    weights_SNQC = scores_SNQC.masked_fill(hidden_SQC[:, None], -torch.inf).softmax(-1)
    out_SKgD = weights_SNQC.view(num_seqs, num_kv_heads, q_SKgD.shape[2], -1) @ v_SKCD
    out_SQND: Tensor = out_SKgD.view_as(q_SNQD).transpose(1, 2)
    return out_SQND.to(q_SQND.dtype)

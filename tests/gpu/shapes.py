"""Layers and batches of true shapes with random weights, for the GPU checks and benches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import AttentionStyle, DenseLayer, MoELayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One decoder layer as a slice holds it, and how many of them a whole model has."""

    name: str
    hidden: int
    mlp: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    layers: int = 1
    vocab: int = 0
    experts: int = 0
    expert_mlp: int = 0
    chunk_size: int = 0

    @property
    def attention_weights(self) -> int:
        """Elements of the attention's matrices."""
        heads = self.q_heads + 2 * self.kv_heads
        return self.hidden * self.head_dim * (heads + self.q_heads)

    @property
    def mlp_weights(self) -> int:
        """Elements of the dense MLP's (or the shared expert's) matrices."""
        return 3 * self.hidden * self.mlp

    @property
    def expert_weights(self) -> int:
        """Elements of one routed expert."""
        return 3 * self.hidden * self.expert_mlp

    def tiny(self) -> Shape:
        """The same structure in sizes that an interpreter gets through."""
        return replace(
            self,
            hidden=32,
            mlp=48,
            q_heads=self.q_heads // self.kv_heads,
            kv_heads=1,
            head_dim=16,
            layers=min(self.layers, 2),
            vocab=min(self.vocab, 96),
            experts=min(self.experts, 4),
            expert_mlp=min(self.expert_mlp, 32),
        )


LLAMA_8B = Shape(
    name="Llama-3.1-8B",
    hidden=4096,
    mlp=14336,
    q_heads=32,
    kv_heads=8,
    layers=32,
    vocab=128256,
)
LLAMA_405B_TP8 = Shape(
    name="a Llama-3.1-405B layer at TP8", hidden=16384, mlp=6656, q_heads=16, kv_heads=1
)
MAVERICK_EP8 = Shape(
    name="a Maverick MoE layer at EP8",
    hidden=5120,
    mlp=8192,
    q_heads=40,
    kv_heads=8,
    experts=16,
    expert_mlp=8192,
)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, gain: float = 1.0) -> Tensor:
    """Normal numbers, made on the device."""
    return torch.randn(*shape, dtype=dtype, device=device).mul_(gain)


def linear(ops: Ops, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Linear:
    """A packed product with weights of variance 1 / columns."""
    weight = randn(rows, columns, dtype=dtype, device=device, gain=columns**-0.5)
    return ops.pack_linear([weight], None, dtype)


def layer(ops: Ops, shape: Shape, dtype: torch.dtype, device: torch.device) -> DenseLayer:
    """One layer; a `MoELayer` where the shape has experts, which all tokens are sent to."""
    heads = shape.q_heads + 2 * shape.kv_heads

    def pack(rows: int, columns: int) -> Linear:
        return linear(ops, rows, columns, dtype, device)

    norm = torch.ones(shape.hidden, device=device)
    dense = DenseLayer(
        attn_norm_H=norm,
        qkv=pack(heads * shape.head_dim, shape.hidden),
        o=pack(shape.hidden, shape.q_heads * shape.head_dim),
        mlp_norm_H=norm,
        gate_up=pack(2 * shape.mlp, shape.hidden),
        down=pack(shape.hidden, shape.mlp),
        num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        softmax_scale=shape.head_dim**-0.5,
        eps=1e-5,
        style=AttentionStyle(mask=AttentionMaskSpec(chunk_size=shape.chunk_size)),
    )
    if not shape.experts:
        return dense
    held = range(shape.experts)
    return MoELayer(
        **{name: getattr(dense, name) for name in DenseLayer.__dataclass_fields__},
        router=pack(shape.experts, shape.hidden),
        experts_gate_up=[pack(2 * shape.expert_mlp, shape.hidden) for _ in held],
        experts_down=[pack(shape.hidden, shape.expert_mlp) for _ in held],
        first_expert=0,
        top_k=1,
    )


def cache(
    ops: Ops,
    shape: Shape,
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    layers: int | None = None,
    block_size: int = 16,
) -> KVCache:
    """A cache that holds the sequences, (tokens cached, tokens new) each, filled with noise."""
    blocks = sum(-(-sum(sizes) // block_size) for sizes in sequences) + 1
    kv = ops.kv_cache(
        KVCacheSpec(
            num_layers=shape.layers if layers is None else layers,
            num_blocks=blocks,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=block_size,
            dtype=dtype,
        ),
        device,
    )
    for data in (getattr(kv, "data", None), getattr(kv, "_data", None)):
        if data is not None and data.is_floating_point() and data.dtype.itemsize > 1:
            data.normal_()
    return kv


def batch(
    sequences: list[tuple[int, int]], head_dim: int, device: torch.device, block_size: int = 16
) -> FlatBatch:
    """The flat batch of sequences with (cached, new) tokens, blocks handed out by turns."""
    contexts = [cached + new for cached, new in sequences]
    widest = max(-(-context // block_size) for context in contexts)
    table = torch.zeros(len(sequences), widest, dtype=torch.int32)
    order = torch.randperm(
        sum(-(-c // block_size) for c in contexts), generator=torch.Generator().manual_seed(0)
    )
    first, positions, slots = 0, [], []
    for s, (cached, new) in enumerate(sequences):
        count = -(-contexts[s] // block_size)
        table[s, :count] = order[first : first + count]
        first += count
        at = torch.arange(cached, cached + new)
        positions.append(at)
        slots.append(table[s, at // block_size] * block_size + at % block_size)
    positions_T = torch.cat(positions)
    inverse = 5e5 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angle = positions_T[:, None] * inverse
    starts = torch.tensor([0, *[new for _, new in sequences]]).cumsum(0)

    def ints(values: Tensor) -> Tensor:
        return values.to(device, torch.int32)

    return FlatBatch(
        positions_T=ints(positions_T),
        query_start_S1=ints(starts),
        context_S=ints(torch.tensor(contexts)),
        block_table_SB=ints(table),
        slots_T=ints(torch.cat(slots)),
        cos_TD=angle.cos().to(device),
        sin_TD=angle.sin().to(device),
        max_query=max(new for _, new in sequences),
        max_context=max(contexts),
    )

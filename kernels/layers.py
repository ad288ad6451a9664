"""A decoder layer of a slice: packed weights and the variants of its attention.

Knows weights and numbers; knows nothing of caches, batches and of how a backend computes a layer.
Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.lora import LayerLora
from arriero.kernels.packed_weights import Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionStyle:
    """Variants of a layer's attention; the defaults are Llama 3's.

    Attributes:
        rope: halves: element i pairs with i + D / 2. pairs: element 2i pairs with 2i + 1 (Llama 4's
            order in checkpoints). none: no encoding of positions.
        qk_norm: after RoPE each head of q and k is divided by its root mean square (without
            weights, with the layer's eps).
        query_scale: (a, f): as the last step, q at position p is multiplied by
            1 + a * ln(1 + floor((p + 1) / f)) (Llama 4's attention temperature); None for off.
        mask: earlier keys that a query attends to.
    """

    rope: Literal["halves", "pairs", "none"] = "halves"
    qk_norm: bool = False
    query_scale: tuple[float, float] | None = None
    mask: AttentionMaskSpec = FULL_ATTENTION


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLayer:
    """This slice's weights of a dense decoder layer.

    Attributes:
        attn_norm_H: float32.
        qkv: rows are all query heads of the slice, then key heads, then value heads.
        o: the slice's columns of the output projection (a single slice has the bias).
        mlp_norm_H: float32.
        gate_up: rows are the gate columns of the slice, then the up columns.
        down: the slice's columns.
        num_q_heads, num_kv_heads, head_dim: heads of the slice; num_q_heads % num_kv_heads == 0.
        softmax_scale: factor of q·k.
        eps: epsilon of both norms.
        style: differences from Llama 3's attention. A backend with fused blocks for the default
            style only must run the ops separately for other styles.
        q_norm_D, k_norm_D: float32 weights of a norm of each head of q, of k, before RoPE, with
            the layer's eps (Qwen3); None for none. Both are given or neither. All heads of a
            slice, and all slices, have the same weights.
        lora: adapters of the layer; None in a group without adapters.
    """

    attn_norm_H: Tensor
    qkv: Linear
    o: Linear
    mlp_norm_H: Tensor
    gate_up: Linear
    down: Linear
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    eps: float
    style: AttentionStyle = AttentionStyle()
    q_norm_D: Tensor | None = None
    k_norm_D: Tensor | None = None
    lora: LayerLora | None = None

    @property
    def norms_nbytes(self) -> int:
        """Bytes of all norms of the layer."""
        norms = (self.attn_norm_H, self.mlp_norm_H, self.q_norm_D, self.k_norm_D)
        return sum(norm.nbytes for norm in norms if norm is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELayer(DenseLayer):
    """A decoder layer with routed experts (Llama 4).

    A dense layer with the shared expert as its MLP (`gate_up` and `down`), and with experts.

    Attributes:
        router: rows are all experts of the model.
        experts_gate_up: for each expert of the slice, gate rows and then up rows.
        experts_down: for each expert of the slice.
        first_expert: global id of the slice's first expert; the ids are consecutive.
        top_k: number of experts for a token.
        index: the layer's index in the model, for callers that route for several layers.
    """

    router: Linear
    experts_gate_up: Sequence[Linear]
    experts_down: Sequence[Linear]
    first_expert: int
    top_k: int
    index: int = 0

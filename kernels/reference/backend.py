"""The reference backend: all ops of the list in plain torch.

Knows the function that defines each op; knows nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import DenseLayer
from arriero.kernels.ops import Ops
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.reference import attention, linear, sampling
from arriero.kernels.reference.kv import ReferenceKVCache
from arriero.kernels.sampling_rows import Sampled, SamplingRows


class ReferenceOps(Ops):
    """The definition of each op, on any device of torch."""

    name = "reference"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack by rows; see `Ops.pack_linear`."""
        return linear.pack_linear(weights_OI, bias_O, dtype, self.device)

    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Keep the rows; see `Ops.pack_vocab`."""
        return linear.pack_vocab(weight_VH, first_row, dtype, self.device)

    def pack_quantized(self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack by rows, keep the stored numbers; see `Ops.pack_quantized`."""
        return linear.pack_quantized(weights, bias_O, self.device)

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Keep the stored numbers; see `Ops.pack_quantized_vocab`."""
        return linear.pack_quantized_vocab(weight, first_row, self.device)

    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache of zeros."""
        return ReferenceKVCache(spec, device)

    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table; see `Ops.embed`."""
        return linear.embed(tokens_T, vocab)

    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm and product; see `Ops.logits`."""
        return linear.matmul(linear.rms_norm(x_RH, norm_H, eps), vocab.packed).float()

    def linear(self, x_TI: Tensor, w: Linear) -> Tensor:
        """The product x Wᵀ + b."""
        if w.inputs is not None:
            return linear.transformed_matmul(self, x_TI, w)
        return linear.matmul(x_TI, w.packed, w.bias)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm; see `Ops.rms_norm`."""
        return linear.rms_norm(x_TH, weight_H, eps)

    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """silu(first half) * second half."""
        return linear.silu_mul(gate_up_TF2)

    def rope_write_kv(
        self, qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Rotate, write, return q; see `Ops.rope_write_kv`."""
        return attention.rope_write_kv(qkv_TE, layer, kv, kv_layer, batch)

    def paged_attention(
        self,
        q_TND: Tensor,
        scale: float,
        kv: KVCache,
        kv_layer: int,
        batch: FlatBatch,
        mask: AttentionMaskSpec = FULL_ATTENTION,
    ) -> Tensor:
        """Causal attention over blocks; see `Ops.paged_attention`."""
        return attention.paged_attention(q_TND, scale, kv, kv_layer, batch, mask)

    def sample(self, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        """Draw a token for each row; see `Ops.sample`."""
        return sampling.sample(logits_RV, rows)

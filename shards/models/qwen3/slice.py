"""A slice of a dense Qwen3: Llama's layers with a norm of each head of q and k.

Knows the names of the norms; `Ops` computes them before RoPE.
"""

from __future__ import annotations

from dataclasses import replace

from arriero.kernels.layers import DenseLayer
from arriero.shards.checkpoint.kv_scales import NO_SCALES
from arriero.shards.models.llama.slice import LlamaSlice
from arriero.shards.models.loader import Loader


class Qwen3Slice(LlamaSlice):
    """Weights and KV cache of a rank of a dense Qwen3, and the forward pass."""

    _norms_keys = True

    def _load_layer(self, loader: Loader, index: int) -> DenseLayer:
        """This rank's part of a decoder layer; `index` is global."""
        layer = super()._load_layer(loader, index)
        name = f"model.layers.{index}.self_attn."
        q_norm_D, k_norm_D = (loader.norm(f"{name}{norm}") for norm in ("q_norm", "k_norm"))
        k_scale = self._kv_scales.get(index, NO_SCALES).k
        return replace(layer, q_norm_D=q_norm_D, k_norm_D=k_norm_D / k_scale)

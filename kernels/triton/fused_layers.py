"""The parts of a layer on CUDA: norm and SwiGLU round rows for the product that reads them.

They write float8 rows where the product rounds its inputs, in place of a launch between the two.
`decoder` has the pass through a stage's layers. Knows the order of a layer's ops; knows nothing of
the inside of kernels. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.halves import HalfSums
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layer_cache import LayerCache, layer_caches
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.lora import AdapterRows
from arriero.kernels.moe import Permutation
from arriero.kernels.ops import Experts, LayerTaps, Ops, Reduce, ReduceNorm
from arriero.kernels.packed_weights import Linear
from arriero.kernels.rounded_rows import InputRows, Rounding, rounding_of, unrounded
from arriero.kernels.triton import experts as expert_kernels
from arriero.kernels.triton.activation import silu_mul, silu_mul_rounded
from arriero.kernels.triton.decoder import TritonDecoder
from arriero.kernels.triton.norm import norm_rows


class FusedLayers(Ops):
    """The blocks of a layer; a subclass has the products and all other ops."""

    @abstractmethod
    def _product(self, x: InputRows, w: Linear) -> Tensor:
        """`linear`, of rows that the kernel before may have rounded for it."""

    @abstractmethod
    def _routed(self, h_TH: Tensor, layer: MoELayer, order: Permutation, rows: int) -> Tensor:
        """Outputs of the routed experts for `rows` (token, expert) pairs, sorted by expert."""

    @abstractmethod
    def _make_tables(self, layer: MoELayer) -> None:
        """Make the tables of a layer's experts, which must exist before a graph is captured."""

    def moe_block(
        self, x_TH: Tensor, layer: MoELayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Norm, shared expert and routed experts; see `Ops.moe_block`."""
        if adapters is not None:
            return super().moe_block(x_TH, layer, adapters)
        return self._moe(self.mlp_rows(x_TH, layer), layer)

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Norm and attention; see `Ops.attention_block`."""
        if batch.adapters is not None:
            return super().attention_block(x_TH, layer, kv, kv_layer, batch)
        rounding = self.attention_rounding(layer)
        h = norm_rows(x_TH, None, layer.attn_norm_H, layer.eps, rounding)
        return self._attention(h, layer, kv, kv_layer, batch)

    def mlp_block(
        self, x_TH: Tensor, layer: DenseLayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Norm and MLP; see `Ops.mlp_block`."""
        if adapters is not None:
            return super().mlp_block(x_TH, layer, adapters)
        return self._mlp(self.mlp_rows(x_TH, layer), layer)

    def mlp_rows(self, x_TH: Tensor, layer: DenseLayer) -> InputRows:
        """The norm, rounded for the MLP in the same launch; see `Ops.mlp_rows`."""
        return norm_rows(x_TH, None, layer.mlp_norm_H, layer.eps, self.mlp_rounding(layer))

    def gated_mlp(
        self, h: InputRows, layer: DenseLayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """SwiGLU rounds its rows for the product after; see `Ops.gated_mlp`."""
        if adapters is not None:
            return super().gated_mlp(h, layer, adapters)
        return self._mlp(h, layer)

    def decoder(
        self,
        layers: Sequence[DenseLayer],
        kv: KVCache | None,
        reduce: Reduce | None,
        *,
        local_kv: KVCache | None = None,
        experts: Experts | None = None,
        taps: LayerTaps | None = None,
        reduce_norm: ReduceNorm | None = None,
        half_sums: HalfSums | None = None,
    ) -> Callable[[Tensor, FlatBatch], Tensor]:
        """The pass through a stage's layers; see `TritonDecoder`."""
        for layer in layers:
            if isinstance(layer, MoELayer):  # make tables of addresses before any graph capture
                self._make_tables(layer)
        return TritonDecoder(
            ops=self,
            layers=layers,
            caches=layer_caches(layers, kv, local_kv),
            reduce=reduce,
            reduce_norm=reduce_norm,
            experts=experts,
            taps=dict(taps or {}),
            half_sums=half_sums,
            with_adapters=super().decoder(layers, kv, reduce, local_kv=local_kv, experts=experts),
        )

    def attention_rounding(self, layer: DenseLayer) -> Rounding | None:
        """Rounding of the normed rows that `run_attention` takes."""
        return rounding_of(layer.qkv)

    def run_attention(
        self, h: InputRows, layer: DenseLayer, cache: LayerCache, batch: FlatBatch
    ) -> Tensor:
        """`attention_block` after the norm, for a step without adapters."""
        return self._attention(h, layer, cache.kv, cache.index, cache.batch(batch))

    def mlp_rounding(self, layer: DenseLayer) -> Rounding | None:
        """Rounding of the normed rows that `run_mlp` takes.

        Router and routed experts read the rows unrounded too.
        """
        return rounding_of(layer.gate_up, keeps_rows=isinstance(layer, MoELayer))

    def run_mlp(self, h: InputRows, layer: DenseLayer) -> Tensor:
        """`mlp_block` or `moe_block` after the norm, for a step without adapters."""
        return self._moe(h, layer) if isinstance(layer, MoELayer) else self._mlp(h, layer)

    def _attention(
        self, h: InputRows, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        q_TND = self.rope_write_kv(self._product(h, layer.qkv), layer, kv, kv_layer, batch)
        out_TE = self.paged_attention(
            q_TND, layer.softmax_scale, kv, kv_layer, batch, layer.style.mask
        )
        return self.linear(out_TE, layer.o)

    def _mlp(self, h: InputRows, layer: DenseLayer) -> Tensor:
        gate_up_TF2, rounding = self._product(h, layer.gate_up), rounding_of(layer.down)
        if rounding is None:
            return self.linear(silu_mul(gate_up_TF2), layer.down)
        return self._product(silu_mul_rounded(gate_up_TF2, rounding), layer.down)

    def _moe(self, h: InputRows, layer: MoELayer) -> Tensor:
        """Routed experts, which take unrounded rows, and the shared expert."""
        h_TH = unrounded(h)
        routing = self.moe_route(h_TH, layer.router, layer.top_k)
        order = expert_kernels.permute(routing, layer.first_expert, len(layer.experts_down))
        y_XH = self._routed(h_TH, layer, order, routing.experts_TA.numel())
        return expert_kernels.combine(y_XH, order.row_TA, self._mlp(h, layer))

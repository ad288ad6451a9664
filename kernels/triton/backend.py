"""The Triton backend: which kernel computes which op, and the decoder's fused loop.

Knows the op list; knows nothing of how a kernel works. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.expert_rows import Wire, check
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.ops import (
    DenseLayer,
    Experts,
    FlatBatch,
    KVCache,
    KVCacheSpec,
    Linear,
    MoELayer,
    Ops,
    Reduce,
    Sampled,
    SamplingRows,
    Vocab,
    layer_caches,
)
from arriero.kernels.quant import QuantizedWeight
from arriero.kernels.triton import embedding as vocabulary
from arriero.kernels.triton import expert_rows as wire
from arriero.kernels.triton import experts, float8, norm, rope, sampling, weights
from arriero.kernels.triton import matmul as product
from arriero.kernels.triton.activation import silu_mul
from arriero.kernels.triton.decode import attend_decodes
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import unit_stride
from arriero.kernels.triton.matmul import ExpertWeights
from arriero.kernels.triton.prefill import attend_prefills
from arriero.kernels.triton.tuning import attention_blocks
from arriero.kernels.triton.upload import Upload
from arriero.kernels.triton.weights import Packed


class TritonOps(Ops):
    """The op list on a CUDA device; on CPU only where Triton is interpreted.

    Attributes:
        batch_independent: every product takes one kernel with one choice of blocks whatever the
            number of rows, so that a row's bits do not depend on its neighbours. Without it,
            unquantized products are the vendor library's, which picks its kernel by the number of
            rows, and quantized ones pick blocks by it. All else is independent either way.
    """

    name = "triton"
    capturable = True

    def __init__(self, device: torch.device, *, batch_independent: bool) -> None:
        self.device, self.batch_independent = device, batch_independent
        self._upload = Upload(device)
        self._experts: dict[tuple[int, ...], ExpertWeights] = {}

    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack by rows on the device; see `Ops.pack_linear`."""
        return _linear(weights.pack_dense(weights_OI, bias_O, dtype, self.device, self._upload))

    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Keep the rows; see `Ops.pack_vocab`."""
        return _vocab(
            weights.pack_dense([weight_VH], None, dtype, self.device, self._upload), first_row
        )

    def pack_quantized(self, parts: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack by rows; see `Ops.pack_quantized`."""
        self._check_kind(parts[0])
        return _linear(weights.pack_quantized(parts, bias_O, self.device, self._upload))

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Keep the stored numbers; see `Ops.pack_quantized_vocab`."""
        self._check_kind(weight)
        return _vocab(weights.pack_quantized([weight], None, self.device, self._upload), first_row)

    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache of zeros."""
        return TritonKVCache(spec, device)

    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table; see `Ops.embed`."""
        return vocabulary.embed(tokens_T, vocab)

    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm and product, the sums kept in float32; see `Ops.logits`."""
        h_RH = norm.rms_norm(x_RH, norm_H, eps)
        table: Packed = vocab.packed
        if table.kind == "dense" and not self.batch_independent and h_RH.is_cuda:
            h_RH = h_RH.to(table.data.dtype)
            if h_RH.dtype == torch.float32:
                return h_RH @ table.data.T
            return torch.mm(h_RH, table.data.T, out_dtype=torch.float32)
        return self._product(h_RH, table, torch.float32)

    def linear(self, x_TI: Tensor, w: Linear) -> Tensor:
        """The product x Wᵀ + b."""
        if w.inputs is not None:
            return self.linear_of_inputs(x_TI, w)
        return self._product(x_TI, w.packed)

    def quantize_rows(self, x_TI: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Round rows to float8 in one pass; see `Ops.quantize_rows`."""
        return float8.quantize_rows(x_TI, bound)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm; see `Ops.rms_norm`."""
        return norm.rms_norm(x_TH, weight_H, eps)

    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """silu(first half) * second half."""
        return silu_mul(gate_up_TF2)

    def rope_write_kv(
        self, qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Rotate, write, return q; see `Ops.rope_write_kv`."""
        return rope.rope_write_kv(qkv_TE, layer, _own(kv), kv_layer, batch)

    def paged_attention(
        self,
        q_TND: Tensor,
        scale: float,
        kv: KVCache,
        kv_layer: int,
        batch: FlatBatch,
        visible: AttentionMaskSpec = FULL_ATTENTION,
    ) -> Tensor:
        """Attention over blocks; see `Ops.paged_attention`."""
        q_TND, cache = unit_stride(q_TND), _own(kv)
        num_tokens, num_heads, dim = q_TND.shape
        out_TND = torch.empty(num_tokens, num_heads, dim, dtype=q_TND.dtype, device=q_TND.device)
        blocks = attention_blocks(q_TND.device, dim, kv.spec.dtype)
        # each kernel leaves the other's sequences alone; only the device knows which are there
        if batch.max_query == 1 or batch.context_S.shape[0] > 1:
            attend_decodes(q_TND, out_TND, scale, cache, kv_layer, batch, visible, blocks)
        if batch.max_query > 1:
            attend_prefills(q_TND, out_TND, scale, cache, kv_layer, batch, visible, blocks)
        return out_TND.view(num_tokens, num_heads * dim)

    def sample(self, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        """Draw one token a row; see `Ops.sample`."""
        return sampling.sample(logits_RV, rows)

    def moe_route(self, x_TH: Tensor, router: Linear, top_k: int) -> Routing:
        """The greatest logits, scored by their sigmoids."""
        return experts.route(self.linear(x_TH, router), top_k)

    def moe_permute(self, routing: Routing, first_expert: int, num_experts: int) -> Permutation:
        """Order the pairs by expert; waits for the device to learn how many there are."""
        order = experts.permute(routing, first_expert, num_experts)
        count = int(order.starts_E1[-1])
        return Permutation(
            token_X=order.token_X[:count],
            score_X=order.score_X[:count],
            starts_E1=order.starts_E1,
            row_TA=order.row_TA,
        )

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """Each expert's rows times its matrix, in one launch."""
        if experts[0].inputs is not None:
            return self.grouped_linear_of_inputs(x_XI, experts, starts_E1)
        return product.grouped_product(
            self._input(x_XI, experts[0].packed),
            self._table(experts),
            starts_E1,
            x_XI.shape[0],
            batch_independent=self.batch_independent,
        )

    def forget_experts(self, layer: MoELayer) -> None:
        """Drop the tables of a layer's experts, which keep their weights alive."""
        for linears in (layer.experts_gate_up, layer.experts_down):
            self._experts.pop(_key(linears), None)

    def moe_combine(self, y_XH: Tensor, permutation: Permutation) -> Tensor:
        """Sum each token's rows in the order of its choices."""
        return experts.combine(y_XH, permutation.row_TA)

    def pack_rows(
        self, x_TH: Tensor, row_X: Tensor, score_X: Tensor | None, format: Wire
    ) -> Tensor:
        """Gather, scale and round in one pass; see `Ops.pack_rows`."""
        return wire.pack(x_TH, row_X, score_X, format)

    def unpack_rows(
        self, rows_XB: Tensor, row_Y: Tensor, size: int, format: Wire, dtype: torch.dtype
    ) -> Tensor:
        """Gather and widen in one pass; see `Ops.unpack_rows`."""
        check(rows_XB, size, format)
        return wire.unpack(rows_XB, row_Y, size, format, dtype)

    def moe_block(self, x_TH: Tensor, layer: MoELayer) -> Tensor:
        """Norm, shared expert and routed experts; see `Ops.moe_block`."""
        return self._moe(self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps), layer)

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Norm and attention; see `Ops.attention_block`."""
        h_TH = self.rms_norm(x_TH, layer.attn_norm_H, layer.eps)
        return self._attention(h_TH, layer, kv, kv_layer, batch)

    def mlp_block(self, x_TH: Tensor, layer: DenseLayer) -> Tensor:
        """Norm and MLP; see `Ops.mlp_block`."""
        return self._mlp(self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps), layer)

    def decoder(
        self,
        layers: Sequence[DenseLayer],
        kv: KVCache | None,
        reduce: Reduce | None,
        *,
        local_kv: KVCache | None = None,
        experts: Experts | None = None,
    ) -> Callable[[Tensor, FlatBatch], Tensor]:
        """The pass through a stage's layers, each residual sum fused with the norm after it."""
        caches = layer_caches(layers, kv, local_kv)
        for layer in layers:
            if isinstance(layer, MoELayer):  # tables of addresses are made before any capture
                self._table(layer.experts_gate_up)
                self._table(layer.experts_down)

        def run(x_TH: Tensor, batch: FlatBatch) -> Tensor:
            h_TH = norm.rms_norm(x_TH, layers[0].attn_norm_H, layers[0].eps)
            for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
                at = cache.batch(batch)
                part = self._attention(h_TH, layer, cache.kv, cache.index, at)
                part = part if reduce is None else reduce(part)
                if isinstance(layer, MoELayer) and experts is not None:
                    x_TH += part
                    part = experts(x_TH, layer)
                else:
                    h_TH = norm.add_rms_norm(x_TH, part, layer.mlp_norm_H, layer.eps)
                    if isinstance(layer, MoELayer):
                        part = self._moe(h_TH, layer)
                    else:
                        part = self._mlp(h_TH, layer)
                part = part if reduce is None else reduce(part)
                if i + 1 < len(layers):
                    after = layers[i + 1]
                    h_TH = norm.add_rms_norm(x_TH, part, after.attn_norm_H, after.eps)
                else:
                    x_TH += part
            return x_TH

        return run

    def _attention(
        self, h_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        q_TND = self.rope_write_kv(self.linear(h_TH, layer.qkv), layer, kv, kv_layer, batch)
        out_TE = self.paged_attention(
            q_TND, layer.softmax_scale, kv, kv_layer, batch, layer.style.visible
        )
        return self.linear(out_TE, layer.o)

    def _mlp(self, h_TH: Tensor, layer: DenseLayer) -> Tensor:
        return self.linear(silu_mul(self.linear(h_TH, layer.gate_up)), layer.down)

    def _moe(self, h_TH: Tensor, layer: MoELayer) -> Tensor:
        routing = self.moe_route(h_TH, layer.router, layer.top_k)
        if layer.experts_down[0].inputs is not None:
            return self._moe_of_inputs(h_TH, layer, routing)
        order = experts.permute(routing, layer.first_expert, len(layer.experts_down))
        rows = routing.experts_TA.numel()
        gate_up, down = self._table(layer.experts_gate_up), self._table(layer.experts_down)
        y_XF2 = product.grouped_product(
            self._input(h_TH, gate_up.first),
            gate_up,
            order.starts_E1,
            rows,
            tokens_X=order.token_X,
            scores_X=order.score_X,
            batch_independent=self.batch_independent,
        )
        y_XH = product.grouped_product(
            self._input(silu_mul(y_XF2), down.first),
            down,
            order.starts_E1,
            rows,
            batch_independent=self.batch_independent,
        )
        return experts.combine(y_XH, order.row_TA, self._mlp(h_TH, layer))

    def _moe_of_inputs(self, h_TH: Tensor, layer: MoELayer, routing: Routing) -> Tensor:
        """As `_moe` for experts that round their inputs; the permutation is made, not folded in."""
        order = experts.permute(routing, layer.first_expert, len(layer.experts_down))
        # the tail of token_X means nothing, but must stay within the rows
        token_X = order.token_X.long().clamp_(0, h_TH.shape[0] - 1)
        h_XH = h_TH[token_X] * order.score_X[:, None].to(h_TH.dtype)
        y_XF2 = self.grouped_linear(h_XH, layer.experts_gate_up, order.starts_E1)
        y_XH = self.grouped_linear(silu_mul(y_XF2), layer.experts_down, order.starts_E1)
        return experts.combine(y_XH, order.row_TA, self._mlp(h_TH, layer))

    def _product(self, x_TI: Tensor, w: Packed, out_dtype: torch.dtype | None = None) -> Tensor:
        if w.kind == "dense" and not self.batch_independent and x_TI.is_cuda:
            return F.linear(x_TI.to(w.data.dtype), w.data, w.bias)
        return product.matmul(
            self._input(x_TI, w), w, batch_independent=self.batch_independent, out_dtype=out_dtype
        )

    def _input(self, x: Tensor, w: Packed) -> Tensor:
        """On CUDA activations follow the weights' dtype; on CPU they stay float32."""
        return x.to(w.data.dtype) if x.is_cuda and w.kind == "dense" else x

    def _table(self, linears: Sequence[Linear]) -> ExpertWeights:
        key = _key(linears)
        found = self._experts.get(key)
        if found is None:
            found = self._experts[key] = ExpertWeights([one.packed for one in linears])
        return found

    def _check_kind(self, weight: QuantizedWeight) -> None:
        if weight.kind != "fp8" or self.device.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(self.device)
        if capability < (8, 9):
            raise NotImplementedError(
                f"fp8 weights need a GPU of compute capability 8.9 or more; this one has "
                f"{capability[0]}.{capability[1]}; use int8"
            )


def _key(experts: Sequence[Linear]) -> tuple[int, ...]:
    """What names a table of these experts; a table keeps them alive, so no id is another's."""
    return tuple(id(one.packed) for one in experts)


def _own(kv: KVCache) -> TritonKVCache:
    assert isinstance(kv, TritonKVCache), "a cache belongs to the backend that made it"
    return kv


def _linear(packed: Packed) -> Linear:
    return Linear(
        out_features=packed.out_features,
        in_features=packed.in_features,
        packed=packed,
        bias=packed.bias,
        nbytes=packed.nbytes,
    )


def _vocab(packed: Packed, first_row: int) -> Vocab:
    return Vocab(
        first_row=first_row,
        num_rows=packed.out_features,
        hidden_size=packed.in_features,
        packed=packed,
        nbytes=packed.nbytes,
    )

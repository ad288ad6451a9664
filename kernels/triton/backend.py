"""The Triton backend: the kernel of each op, and the decoder's fused loop.

Knows the op list; knows nothing of the inside of kernels. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels import input_transform
from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat, check
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.halves import HalfSums
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layer_cache import LayerCache, layer_caches
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.lora import AdapterRows, LoraBank
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.ops import Experts, LayerTaps, Ops, Reduce, ReduceNorm
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.sampling_rows import Sampled, SamplingRows
from arriero.kernels.symmetric_memory import RankSums
from arriero.kernels.triton import (
    block_scaled,
    embedding,
    expert_rows,
    experts,
    float8,
    lora,
    matmul,
    norm,
    rope,
    sampling,
    scaled_experts,
    scaled_products,
    sums,
    symmetric_sums,
    weights,
)
from arriero.kernels.triton.activation import silu_mul
from arriero.kernels.triton.block_scaled import BlockScaled
from arriero.kernels.triton.decode import attend_decodes
from arriero.kernels.triton.decoder import TritonDecoder
from arriero.kernels.triton.expert_weights import ExpertWeights
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import unit_stride
from arriero.kernels.triton.prefill import attend_prefills
from arriero.kernels.triton.tuning import attention_blocks
from arriero.kernels.triton.upload import Upload
from arriero.kernels.triton.weights import Packed


class TritonOps(Ops):
    """The op list on a CUDA device; on CPU only where Triton is interpreted.

    Attributes:
        batch_independent: each matrix product uses the same kernel and blocks for any number of
            rows, so that the bits of a row do not depend on the other rows. Otherwise the vendor
            library multiplies unquantized weights and chooses its kernel by the number of rows,
            and quantized products choose blocks by the number of rows; and decodes have tiles of
            few rows, so that a token's bits depend on whether it is a sequence's only new token.
            All other ops are independent of the batch in both cases.
    """

    name = "triton"
    capturable = True
    rank_sums: RankSums | None = symmetric_sums

    def __init__(self, device: torch.device, *, batch_independent: bool) -> None:
        self.device, self.batch_independent = device, batch_independent
        self._upload = Upload(device)
        self._arrivals = matmul.make_arrivals(device)
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
        if parts[0].kind == "fp8" and not self.batch_independent:
            scaled_products.works_on(self.device)  # found out while weights load, not in a step
        return _linear(weights.pack_quantized(parts, bias_O, self.device, self._upload))

    def pack_transformed(
        self, parts: Sequence[QuantizedWeight], bias_O: Tensor | None, inputs: InputTransform
    ) -> Linear:
        """Stack by rows; NVFP4 with rounded inputs in the order of torch's block-scaled product."""
        if not self._scales_in_blocks(parts, inputs):
            return super().pack_transformed(parts, bias_O, inputs)
        assert inputs.scale is not None, "checked in `_scales_in_blocks`"
        packed = block_scaled.pack(parts, inputs.scale, self.device, self._upload)
        plain = Linear(
            out_features=packed.out_features,
            in_features=packed.in_features,
            packed=packed,
            bias=None,
            nbytes=packed.nbytes,
        )
        return self._transforming(plain, bias_O, inputs)

    def pack_expert(self, parts: Sequence[QuantizedWeight], inputs: InputTransform) -> Linear:
        """Stack by rows for `grouped_linear`, whose kernels are Triton's for NVFP4."""
        return super().pack_transformed(parts, None, inputs)

    def _scales_in_blocks(self, parts: Sequence[QuantizedWeight], inputs: InputTransform) -> bool:
        """Whether torch's block-scaled product takes these matrices; see `block_scaled`."""
        if self.batch_independent or inputs.levels != "fp4" or inputs.scale is None:
            return False
        plain = inputs.order_I is None
        return plain and block_scaled.takes(parts) and block_scaled.works_on(self.device)

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Keep the stored numbers; see `Ops.pack_quantized_vocab`."""
        self._check_kind(weight)
        if weight.kind == "fp4":
            raise NotImplementedError("kernels='triton' has no fp4 tables; use plain tables")
        return _vocab(weights.pack_quantized([weight], None, self.device, self._upload), first_row)

    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache of zeros."""
        return TritonKVCache(spec, device)

    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table; see `Ops.embed`."""
        return embedding.embed(tokens_T, vocab)

    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm and product, with float32 sums; see `Ops.logits`."""
        h_RH = norm.rms_norm(x_RH, norm_H, eps)
        table: Packed = vocab.packed
        if table.kind == "dense" and not self.batch_independent and h_RH.is_cuda:
            h_RH = h_RH.to(table.data.dtype)
            if h_RH.dtype == torch.float32:
                return h_RH @ table.data.T
            return torch.mm(h_RH, table.data.T, out_dtype=torch.float32)
        return self._matmul(h_RH, table, torch.float32)

    def linear(self, x_TI: Tensor, w: Linear) -> Tensor:
        """The product x Wᵀ + b."""
        if w.inputs is None:
            return self._matmul(x_TI, w.packed)
        if isinstance(w.packed, BlockScaled):
            return self._block_scaled_linear(x_TI, w, w.packed)
        if self._scales_in_product(x_TI, w):
            return self._scaled_linear(x_TI, w, w.inputs)
        return input_transform.linear(self, x_TI, w)

    def _scales_in_product(self, x_TI: Tensor, w: Linear) -> bool:
        """Whether torch's float8 product computes this one; see `scaled_products`."""
        if self.batch_independent or w.inputs is None or not w.inputs.float8:
            return False
        if x_TI.is_cuda and x_TI.dtype != torch.bfloat16:
            return False
        return scaled_products.takes(w.packed) and scaled_products.works_on(self.device)

    def _scaled_linear(self, x_TI: Tensor, w: Linear, inputs: InputTransform) -> Tensor:
        """The product with inputs rounded to float8, on the tensor cores' own type."""
        if inputs.order_I is not None:
            x_TI = x_TI.index_select(1, inputs.order_I)
        q_TI, scale = input_transform.float8_rows(self, x_TI, inputs)
        y_TO = scaled_products.multiply(q_TI, scale, w.packed, x_TI.dtype)
        return y_TO if w.bias is None else y_TO.add_(w.bias)

    def _block_scaled_linear(self, x_TI: Tensor, w: Linear, packed: BlockScaled) -> Tensor:
        """The product with inputs rounded to NVFP4, on the tensor cores' own type."""
        assert w.inputs is not None and w.inputs.scale is not None, "of `pack_transformed`"
        y_TO = block_scaled.multiply(x_TI, w.inputs.scale, packed)
        return y_TO if w.bias is None else y_TO.add_(w.bias)

    def quantize_rows(self, x_TI: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Round rows to float8 in one pass; see `Ops.quantize_rows`."""
        return float8.quantize_rows(x_TI, bound)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm; see `Ops.rms_norm`."""
        return norm.rms_norm(x_TH, weight_H, eps)

    def add_parts(self, parts_NTH: Tensor) -> Tensor:
        """The sum in rank order, in one launch; see `Ops.add_parts`."""
        return sums.add_parts(parts_NTH)

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
        mask: AttentionMaskSpec = FULL_ATTENTION,
    ) -> Tensor:
        """Attention over blocks; see `Ops.paged_attention`."""
        q_TND, cache = unit_stride(q_TND), _own(kv)
        num_tokens, num_heads, dim = q_TND.shape
        out_TND = torch.empty(num_tokens, num_heads, dim, dtype=q_TND.dtype, device=q_TND.device)
        blocks = attention_blocks(q_TND.device, dim, kv.spec.dtype)
        # Each kernel skips the sequences of the other; only the device knows which kinds exist.
        if batch.max_query == 1 or batch.context_S.shape[0] > 1:
            tile = blocks if self.batch_independent else blocks.fast
            attend_decodes(q_TND, out_TND, scale, cache, kv_layer, batch, mask, tile)
        if batch.max_query > 1:
            attend_prefills(q_TND, out_TND, scale, cache, kv_layer, batch, mask, blocks)
        return out_TND.view(num_tokens, num_heads * dim)

    def sample(self, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        """Draw a token for each row; see `Ops.sample`."""
        return sampling.sample(logits_RV, rows)

    def moe_route(self, x_TH: Tensor, router: Linear, top_k: int) -> Routing:
        """The experts with the greatest logits; the sigmoid of a logit is the score."""
        return experts.route(self.linear(x_TH, router), top_k)

    def moe_permute(self, routing: Routing, first_expert: int, num_experts: int) -> Permutation:
        """Order the pairs by expert; waits for the device, which knows the number of pairs."""
        order = experts.permute(routing, first_expert, num_experts)
        count = int(order.starts_E1[-1])
        return Permutation(
            token_X=order.token_X[:count],
            score_X=order.score_X[:count],
            starts_E1=order.starts_E1,
            row_TA=order.row_TA,
        )

    def moe_permute_all(self, routing: Routing, num_experts: int) -> Permutation:
        """As `moe_permute` for all experts, without a wait; see `Ops.moe_permute_all`."""
        return experts.permute(routing, 0, num_experts)

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """The rows of each expert times its matrix, in a single launch."""
        inputs = experts[0].inputs
        if isinstance(experts[0].packed, BlockScaled):  # not of `pack_expert`
            return super().grouped_linear(x_XI, experts, starts_E1)
        if inputs is not None:
            if inputs.bound is not None and self._scales_in_experts(x_XI, experts):
                table, rows = self._table(experts), x_XI.shape[0]
                return scaled_experts.multiply(x_XI, table, inputs.bound, starts_E1, rows)
            return input_transform.grouped_linear(self, x_XI, experts, starts_E1)
        return matmul.grouped_matmul(
            self._input(x_XI, experts[0].packed),
            self._table(experts),
            starts_E1,
            x_XI.shape[0],
            batch_independent=self.batch_independent,
        )

    def _scales_in_experts(self, x: Tensor, experts: Sequence[Linear]) -> bool:
        """Whether torch's grouped float8 product computes this one; see `scaled_experts`."""
        if experts[0].inputs is None or (x.is_cuda and x.dtype != torch.bfloat16):
            return False
        return self._table(experts).stack is not None

    def replace_experts(self, old: MoELayer, new: MoELayer) -> None:
        """Put other experts into the tables of a layer, which captured graphs read."""
        for before, after in (
            (old.experts_gate_up, new.experts_gate_up),
            (old.experts_down, new.experts_down),
        ):
            table = self._experts.pop(_key(before), None)
            if table is not None:
                table.replace([linear.packed for linear in after])
                self._experts[_key(after)] = table

    def drop_tables(self) -> None:
        """Drop the tables of experts, which keep the weights alive."""
        self._experts.clear()

    def moe_combine(self, y_XH: Tensor, permutation: Permutation) -> Tensor:
        """Sum the rows of each token in the order of its choices."""
        return experts.combine(y_XH, permutation.row_TA)

    def pack_rows(
        self, x_TH: Tensor, row_X: Tensor, score_X: Tensor | None, format: RowFormat
    ) -> Tensor:
        """Gather, scale and round in one pass; see `Ops.pack_rows`."""
        return expert_rows.pack(x_TH, row_X, score_X, format)

    def unpack_rows(
        self, rows_XB: Tensor, row_Y: Tensor, size: int, format: RowFormat, dtype: torch.dtype
    ) -> Tensor:
        """Gather and widen in one pass; see `Ops.unpack_rows`."""
        check(rows_XB, size, format)
        return expert_rows.unpack(rows_XB, row_Y, size, format, dtype)

    def add_lora(
        self, y_TO: Tensor, x_TI: Tensor, banks: Sequence[LoraBank], rows: AdapterRows
    ) -> None:
        """See `Ops.add_lora`."""
        lora.add(y_TO, x_TI, banks, rows)

    def moe_block(
        self, x_TH: Tensor, layer: MoELayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Norm, shared expert and routed experts; see `Ops.moe_block`."""
        if adapters is not None:
            return super().moe_block(x_TH, layer, adapters)
        return self._moe(self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps), layer)

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Norm and attention; see `Ops.attention_block`."""
        if batch.adapters is not None:
            return super().attention_block(x_TH, layer, kv, kv_layer, batch)
        h_TH = self.rms_norm(x_TH, layer.attn_norm_H, layer.eps)
        return self._attention(h_TH, layer, kv, kv_layer, batch)

    def mlp_block(
        self, x_TH: Tensor, layer: DenseLayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Norm and MLP; see `Ops.mlp_block`."""
        if adapters is not None:
            return super().mlp_block(x_TH, layer, adapters)
        return self._mlp(self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps), layer)

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
        """The pass through a stage's layers; each residual sum is fused with the following norm."""
        for layer in layers:
            if isinstance(layer, MoELayer):  # make tables of addresses before any graph capture
                self._table(layer.experts_gate_up)
                self._table(layer.experts_down)
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

    def run_attention(
        self, h_TH: Tensor, layer: DenseLayer, cache: LayerCache, batch: FlatBatch
    ) -> Tensor:
        """`attention_block` after the norm, for a step without adapters."""
        return self._attention(h_TH, layer, cache.kv, cache.index, cache.batch(batch))

    def run_mlp(self, h_TH: Tensor, layer: DenseLayer) -> Tensor:
        """`mlp_block` or `moe_block` after the norm, for a step without adapters."""
        return self._moe(h_TH, layer) if isinstance(layer, MoELayer) else self._mlp(h_TH, layer)

    def _attention(
        self, h_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        q_TND = self.rope_write_kv(self.linear(h_TH, layer.qkv), layer, kv, kv_layer, batch)
        out_TE = self.paged_attention(
            q_TND, layer.softmax_scale, kv, kv_layer, batch, layer.style.mask
        )
        return self.linear(out_TE, layer.o)

    def _mlp(self, h_TH: Tensor, layer: DenseLayer) -> Tensor:
        return self.linear(silu_mul(self.linear(h_TH, layer.gate_up)), layer.down)

    def _moe(self, h_TH: Tensor, layer: MoELayer) -> Tensor:
        routing = self.moe_route(h_TH, layer.router, layer.top_k)
        if layer.experts_down[0].inputs is not None:
            linears = layer.experts_gate_up, layer.experts_down
            if all(self._scales_in_experts(h_TH, experts) for experts in linears):
                return self._scaled_moe(h_TH, layer, routing)
            return self._moe_with_transform(h_TH, layer, routing)
        order = experts.permute(routing, layer.first_expert, len(layer.experts_down))
        rows = routing.experts_TA.numel()
        gate_up, down = self._table(layer.experts_gate_up), self._table(layer.experts_down)
        y_XF2 = matmul.grouped_matmul(
            self._input(h_TH, gate_up.first),
            gate_up,
            order.starts_E1,
            rows,
            tokens_X=order.token_X,
            scores_X=order.score_X,
            batch_independent=self.batch_independent,
        )
        y_XH = matmul.grouped_matmul(
            self._input(silu_mul(y_XF2), down.first),
            down,
            order.starts_E1,
            rows,
            batch_independent=self.batch_independent,
        )
        return experts.combine(y_XH, order.row_TA, self._mlp(h_TH, layer))

    def _scaled_moe(self, h_TH: Tensor, layer: MoELayer, routing: Routing) -> Tensor:
        """As `_moe`, by torch's grouped float8 products: two launches for each product."""
        order = experts.permute(routing, layer.first_expert, len(layer.experts_down))
        multiply, rows = scaled_experts.multiply, routing.experts_TA.numel()
        gate_up, down = self._table(layer.experts_gate_up), self._table(layer.experts_down)
        y_XF2 = multiply(
            h_TH,
            gate_up,
            _bound(layer.experts_gate_up),
            order.starts_E1,
            rows,
            tokens_X=order.token_X,
            scores_X=order.score_X,
        )
        gated_XF = silu_mul(y_XF2)
        y_XH = multiply(gated_XF, down, _bound(layer.experts_down), order.starts_E1, rows)
        return experts.combine(y_XH, order.row_TA, self._mlp(h_TH, layer))

    def _moe_with_transform(self, h_TH: Tensor, layer: MoELayer, routing: Routing) -> Tensor:
        """As `_moe`, for experts that transform their inputs: gather rows, then multiply."""
        order = experts.permute(routing, layer.first_expert, len(layer.experts_down))
        # The tail of token_X is arbitrary, but must stay within the rows.
        token_X = order.token_X.long().clamp_(0, h_TH.shape[0] - 1)
        h_XH = h_TH[token_X] * order.score_X[:, None].to(h_TH.dtype)
        y_XF2 = self.grouped_linear(h_XH, layer.experts_gate_up, order.starts_E1)
        y_XH = self.grouped_linear(silu_mul(y_XF2), layer.experts_down, order.starts_E1)
        return experts.combine(y_XH, order.row_TA, self._mlp(h_TH, layer))

    def _matmul(self, x_TI: Tensor, w: Packed, out_dtype: torch.dtype | None = None) -> Tensor:
        if w.kind == "dense" and not self.batch_independent and x_TI.is_cuda:
            return F.linear(x_TI.to(w.data.dtype), w.data, w.bias)
        return matmul.matmul(
            self._input(x_TI, w),
            w,
            arrivals=self._arrivals,
            batch_independent=self.batch_independent,
            out_dtype=out_dtype,
        )

    def _input(self, x: Tensor, w: Packed) -> Tensor:
        """Activations in the weights' dtype on CUDA, in float32 on CPU."""
        return x.to(w.data.dtype) if x.is_cuda and w.kind == "dense" else x

    def _table(self, linears: Sequence[Linear]) -> ExpertWeights:
        key = _key(linears)
        table = self._experts.get(key)
        if table is None:
            stacked = not self.batch_independent and scaled_experts.takes(linears)
            table = self._experts[key] = ExpertWeights(
                [linear.packed for linear in linears],
                stacked=stacked and scaled_experts.works_on(self.device),
            )
        return table

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
    """Key of a table of experts; the table keeps the experts alive, so that ids stay unique."""
    return tuple(id(expert.packed) for expert in experts)


def _bound(experts: Sequence[Linear]) -> float:
    """Bound of the rows' scales, where `scaled_experts` takes the experts."""
    inputs = experts[0].inputs
    assert inputs is not None and inputs.bound is not None, "the caller checks"
    return inputs.bound


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

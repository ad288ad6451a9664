"""The Triton backend: the kernel of each op; `routed_experts` and `fused_layers` have the layers.

Knows the op list; knows nothing of the inside of kernels. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arriero.kernels import input_transform
from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat, check
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import DenseLayer
from arriero.kernels.lora import AdapterRows, LoraBank
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.rounded_rows import InputRows, RoundedRows, unrounded
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
    scaled_products,
    sums,
    symmetric_sums,
    weights,
)
from arriero.kernels.triton.activation import silu_mul
from arriero.kernels.triton.block_scaled import BlockScaled
from arriero.kernels.triton.decode import attend_decodes
from arriero.kernels.triton.kv import TritonKVCache
from arriero.kernels.triton.launch import unit_stride
from arriero.kernels.triton.prefill import attend_prefills
from arriero.kernels.triton.routed_experts import RoutedExperts
from arriero.kernels.triton.tuning import attention_blocks
from arriero.kernels.triton.upload import Upload
from arriero.kernels.triton.weights import Packed


class TritonOps(RoutedExperts):
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
        super().__init__()
        self.device, self.batch_independent = device, batch_independent
        self._upload = Upload(device)
        self._arrivals = matmul.make_arrivals(device)

    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack by rows on the device; see `Ops.pack_linear`."""
        return weights.linear(
            weights.pack_dense(weights_OI, bias_O, dtype, self.device, self._upload)
        )

    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Keep the rows; see `Ops.pack_vocab`."""
        return weights.vocab(
            weights.pack_dense([weight_VH], None, dtype, self.device, self._upload), first_row
        )

    def pack_quantized(self, parts: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack by rows; see `Ops.pack_quantized`."""
        self._check_kind(parts[0])
        if parts[0].kind == "fp8" and not self.batch_independent:
            scaled_products.works_on(self.device)  # found out while weights load, not in a step
        return weights.linear(weights.pack_quantized(parts, bias_O, self.device, self._upload))

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
        return weights.vocab(
            weights.pack_quantized([weight], None, self.device, self._upload), first_row
        )

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
        return self._product(x_TI, w)

    def _product(self, x: InputRows, w: Linear) -> Tensor:
        """See `FusedLayers._product`."""
        if w.inputs is None:
            return self._matmul(unrounded(x), w.packed)
        if isinstance(w.packed, BlockScaled):
            return self._block_scaled_linear(unrounded(x), w, w.packed)
        if self._scales_in_product(x, w):
            return self._scaled_linear(x, w, w.inputs)
        return input_transform.linear(self, x, w)

    def _scales_in_product(self, x: InputRows, w: Linear) -> bool:
        """Whether torch's float8 product computes this one; see `scaled_products`."""
        if self.batch_independent or w.inputs is None or not w.inputs.float8:
            return False
        if x.is_cuda and x.dtype != torch.bfloat16:
            return False
        return scaled_products.takes(w.packed) and scaled_products.works_on(self.device)

    def _scaled_linear(self, x: InputRows, w: Linear, inputs: InputTransform) -> Tensor:
        """The product with inputs rounded to float8, on the tensor cores' own type."""
        if isinstance(x, RoundedRows):
            q_TI, scale = x.levels_TI, x.scale_T1
        else:
            if inputs.order_I is not None:
                x = x.index_select(1, inputs.order_I)
            q_TI, scale = input_transform.float8_rows(self, x, inputs)
        y_TO = scaled_products.multiply(q_TI, scale, w.packed, x.dtype)
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

    def _check_kind(self, weight: QuantizedWeight) -> None:
        if weight.kind != "fp8" or self.device.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(self.device)
        if capability < (8, 9):
            raise NotImplementedError(
                f"fp8 weights need a GPU of compute capability 8.9 or more; this one has "
                f"{capability[0]}.{capability[1]}; use int8"
            )


def _own(kv: KVCache) -> TritonKVCache:
    assert isinstance(kv, TritonKVCache), "a cache belongs to the backend that made it"
    return kv

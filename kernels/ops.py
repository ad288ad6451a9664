"""The op list: all operations of a model, each declared once.

A backend is a subclass of `Ops`. `reference` defines each op in plain torch; `cpu` (C++) and
`triton` (CUDA) compute the same numbers faster. A model has an `Ops` and never names a backend.

This module knows tensors; it knows nothing of models, checkpoints, processes and requests.

Shape legend for suffixes of tensor names. F, V, N and K are the numbers on this slice.
    T  tokens of the flat batch (prefill chunks and decodes together)
    S  sequences of the flat batch, in batch order; sequence s has tokens
       query_start[s] .. query_start[s + 1]
    R  rows with wanted logits
    H  hidden size      F  MLP columns          V  vocabulary rows
    N  query heads      K  key/value heads      D  head_dim
    B  blocks of a sequence's table             P  slots in a block (block size)

Activations between ops are float32 on CPU for any dtype of the weights (residual stream, norms,
softmax and accumulations stay float32; an op may round the *input* of a matrix product to the
weights' dtype), and in the weights' dtype on CUDA.

**Same tokens.** Each output row depends on its own inputs only, bit for bit: the order of
reduction may depend on the shapes of weights and on the context of the row, but never on the number
of other rows, on the cuts between prefill chunks, or on the number of threads. `reference` keeps
this rule to rounding only, since torch chooses kernels for matrix products by batch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from arriero.kernels import adapted, expert_rows, lora, moe
from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.expert_rows import RowFormat
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.halves import HalfSums
from arriero.kernels.input_transform import InputTransform, quantize_rows
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layer_cache import layer_caches
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.lora import AdapterRows, LoraBank
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.packed_file import PackedFile
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.rounded_rows import InputRows, Rounding, unrounded
from arriero.kernels.sampling_rows import Sampled, SamplingRows
from arriero.kernels.symmetric_memory import RankSums

Reduce = Callable[[Tensor], Tensor]
"""Sums a partial result [T, H] over the slices of a tensor-parallel stage, perhaps in place."""

ReduceNorm = Callable[[Tensor, Tensor, Tensor, float, Rounding | None], InputRows | None]
"""(part, x, weight, eps, rounding): adds the sum of the slices' parts to x, in place, and gives the
norm of x, rounded for the product that reads it where `rounding` is given; the bits of `Reduce`, a
sum and `Ops.rms_norm`. None, without any effect, where these do it."""

Experts = Callable[[Tensor, MoELayer, AdapterRows | None], Tensor]
"""As `Ops.moe_block`, with experts on other ranks."""

LayerTaps = Mapping[int, Callable[[Tensor], None]]
"""Called with x [T, H] as it enters a layer of the stage, by the layer's number in the stage; the
number of layers stands for the output of the last one. A function that keeps x must copy it."""


class Ops(ABC):
    """The op list. Subclasses are backends; `arriero.kernels.select.ops_for` chooses a backend."""

    name: str
    device: torch.device
    capturable: bool = False
    """A decode step may be captured in a CUDA graph: none of its ops waits for the device."""
    rank_sums: RankSums | None = None
    """Sums over memory that ranks share; None where the backend has none."""

    # Packing: once, at load; afterwards only the packed form remains.

    @abstractmethod
    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack matrices [out_i, in] by rows, convert to `dtype` and pack them.

        The inputs may be views of mapped files; the result does not refer to the inputs.
        """

    @abstractmethod
    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Pack vocabulary rows so that both `embed` and `logits` can read them."""

    def pack_quantized(self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack quantized matrices by rows and pack them; `linear` takes the result.

        The product is y = x Ŵᵀ + b with Ŵ exactly `QuantizedWeight.dequantize()` of the stack: a
        backend may round x to bfloat16, but may not round Ŵ further (levels are exact in bfloat16,
        so a backend multiplies levels and applies scales to float32 sums). A backend may lack
        some kinds of `QuantKind`.

        Raises:
            ValueError: the matrices differ in kind, group size or columns.
            NotImplementedError: this backend has no kernel for the kind.
        """
        raise NotImplementedError(
            f"kernels={self.name!r} has no kernel for {weights[0].kind} weights; "
            "load the model without quantization or use kernels='reference'"
        )

    def pack_transformed(
        self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None, inputs: InputTransform
    ) -> Linear:
        """`pack_quantized` for weights that need a transform of the inputs: a new order, rounding.

        `linear` and `grouped_linear` take the result. With rounded inputs the product is
        y = scale_T * (q_TI Qᵀ) * scale_O + b, with q the levels of `InputTransform` and Q the
        stored numbers (fp4: times the scales of their groups; scale_O are the row scales). Products
        of two float8 numbers are exact in float32, and sums of up to 2**17 products are exact in
        float64: `reference` sums in float64 by definition, the other backends in float32.

        Raises:
            ValueError, NotImplementedError: as `pack_quantized`.
        """
        return self._transforming(self.pack_quantized(weights, None), bias_O, inputs)

    def _transforming(self, plain: Linear, bias_O: Tensor | None, inputs: InputTransform) -> Linear:
        """Packed weights without a bias, with a transform of the inputs and a bias after it."""
        bias = None if bias_O is None else bias_O.to(self.device, torch.float32, copy=True)
        inputs = inputs.to(self.device)
        return replace(
            plain,
            in_features=inputs.num_inputs,
            bias=bias,
            nbytes=plain.nbytes + inputs.nbytes + (0 if bias is None else bias.nbytes),
            inputs=inputs,
        )

    def pack_expert(self, weights: Sequence[QuantizedWeight], inputs: InputTransform) -> Linear:
        """`pack_transformed` for an expert, which `grouped_linear` multiplies with others."""
        return self.pack_transformed(weights, None, inputs)

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Pack quantized vocabulary rows for `embed` and `logits`; see `pack_quantized`.

        Raises:
            NotImplementedError: this backend has no kernel for the kind.
        """
        raise NotImplementedError(
            f"kernels={self.name!r} has no kernel for an embedding of {weight.kind} weights; "
            "leave the embedding unquantized or use kernels='reference'"
        )

    def offloading(self, folder: Path) -> AbstractContextManager[None]:
        """Weights packed within the context stay on disk and are read ahead of use.

        Args:
            folder: folder on a disk with room for the weights.

        Raises:
            NotImplementedError: this backend keeps all weights on its device.
        """
        raise NotImplementedError(
            f"kernels={self.name!r} keeps all weights on its device; use offload_layers=0"
        )

    @property
    def packed_build(self) -> str:
        """What the bytes of packed weights depend on beside the weights; "" keeps no files."""
        return ""

    def packed_file(self, path: Path) -> PackedFile:
        """Packed weights in a file, which is written if it does not exist.

        Raises:
            NotImplementedError: the backend keeps no files.
        """
        raise NotImplementedError(f"kernels={self.name!r} keeps no packed weights in files")

    @abstractmethod
    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache."""

    # Operations.

    @abstractmethod
    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table, [T, H]; zeros for a token with a row on another slice."""

    @abstractmethod
    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm, then the product with the rows of this slice: float32 [R, V]."""

    @abstractmethod
    def linear(self, x_TI: Tensor, w: Linear) -> Tensor:
        """The product x Wᵀ + b: [T, O]."""

    def add_lora(
        self, y_TO: Tensor, x_TI: Tensor, banks: Sequence[LoraBank], rows: AdapterRows
    ) -> None:
        """Add the adapters' products with x to y, in place: y += (x Aᵀ) B, by the slot of the row.

        Rows without an adapter stay as they are, bit for bit.
        """
        lora.add_lora(y_TO, x_TI, banks, rows)

    def quantize_rows(self, x_TI: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Round rows to float8: q float8_e4m3fn [T, I] and scale float32 [T, 1].

        Defined by `kernels.input_transform.quantize_rows`.
        """
        return quantize_rows(x_TI, bound)

    @abstractmethod
    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm: x / sqrt(mean(x²) + eps), float32 inside, times the weight.

        Source: Zhang and Sennrich, 2019.
        """

    def add_parts(self, parts_NTH: Tensor) -> Tensor:
        """The sum of N parts in their order, each partial sum rounded to the dtype: [T, H].

        May work in place of the first part.
        """
        total_TH = parts_NTH[0]
        for part_TH in parts_NTH[1:]:
            total_TH += part_TH
        return total_TH

    @abstractmethod
    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """silu(first half) * second half: [T, 2F] to [T, F] (SwiGLU, Shazeer 2020)."""

    @abstractmethod
    def rope_write_kv(
        self, qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Rotate q and k, write k and v to their slots; returns q [T, N, D].

        RoPE (Su 2021) by halves, as Hugging Face stores Llama: element i pairs with i + D / 2.
        Before RoPE each head of q and k is normed, where the layer has weights for this norm.
        `layer.style` may set another layout, and the QK norm and query scale that follow.
        """

    @abstractmethod
    def paged_attention(
        self,
        q_TND: Tensor,
        scale: float,
        kv: KVCache,
        kv_layer: int,
        batch: FlatBatch,
        mask: AttentionMaskSpec = FULL_ATTENTION,
    ) -> Tensor:
        """Causal attention of each token over the blocks of its sequence: [T, N * D].

        Paged attention (Kwon 2023) over a flat batch. A token at position p attends to keys 0..p,
        or to the keys of `mask` among these. Blocks without a key of the sequence's first query may
        be freed, except blocks of `sinks`; the table entries of free blocks are arbitrary and are
        not read.
        """

    @abstractmethod
    def sample(self, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        """Draw a token for each row. May overwrite the logits.

        Order: bias and allowed sets, penalties, temperature, the filters min-p, top-k and top-p,
        then the draw: an exponential race, which is Gumbel-max in other terms. Each token has a
        random number of its own, from Philox-4x32-10 (Salmon 2011) with the seed as key and the
        position as counter, and from the token's id. Two models with similar likelihoods draw the
        same token more often than by any draw with one number for all tokens.

        The definition, so that all backends draw the same token:

        * Penalties: repetition, then frequency, then presence. Greedy rows (temperature 0) take
          the greatest logit after bias, bans and penalties; with equal logits the lowest id.
        * The weight of a token is the integer floor(exp((x - max x) / temperature) * 2**44), exp
          and division in float64. All sums of weights are exact int64, in any order.
        * min-p keeps weights >= min_p * 2**44. top-k keeps weights >= the k-th greatest weight.
          top-p keeps weights >= the smallest weight, from the greatest down, with a sum of greater
          weights below p * (sum of the remaining weights). Tokens of equal weight are kept
          together.
        * The draw takes the token with the least -log(u) / weight, in float64; of equal ones the
          lowest id; never a token of weight 0. u is that of `kernels.token_noise.token_uniforms`.
          Logarithms of different libraries differ in the last bits: the token can differ only where
          two quotients are equal to within 1e-15.
        * A row with no finite greatest logit after the bans (all tokens banned, or NaN) gives token
          -1 with log-probability -inf: no token may be sampled.
        """

    # Experts. Shape legend: kernels/moe.py. The defaults are the definition, by calls of `linear`.

    def moe_route(self, x_TH: Tensor, router: Linear, top_k: int) -> Routing:
        """Choose the experts of each token: greatest logits; scores are sigmoids (Llama 4)."""
        return moe.route(self.linear(x_TH, router).float(), top_k)

    def moe_permute(self, routing: Routing, first_expert: int, num_experts: int) -> Permutation:
        """Order the (token, expert) pairs with a local expert by expert, then by token."""
        return moe.permute(routing, first_expert, num_experts)

    def moe_permute_all(self, routing: Routing, num_experts: int) -> Permutation:
        """`moe_permute` with all experts local, so that the host knows the number of rows."""
        return self.moe_permute(routing, 0, num_experts)

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """Rows starts[e] .. starts[e + 1] times the e-th matrix: [X, O].

        All experts have the same kind of `inputs`.
        """
        counts = starts_E1.diff().tolist()
        parts = [
            self.linear(x, expert)
            for x, expert in zip(torch.split(x_XI, counts), experts, strict=True)
            if x.shape[0]
        ]
        return torch.cat(parts) if parts else x_XI.new_empty(0, experts[0].out_features)

    def expert_mlp(self, x_XH: Tensor, layer: MoELayer, starts_E1: Tensor) -> Tensor:
        """Outputs of a layer's experts for rows sorted by expert, times their scores: [X, H]."""
        y_XF2 = self.grouped_linear(x_XH, layer.experts_gate_up, starts_E1)
        return self.grouped_linear(self.silu_mul(y_XF2), layer.experts_down, starts_E1)

    def replace_experts(self, old: MoELayer, new: MoELayer) -> None:  # noqa: B027
        """Let cached data of a layer's experts be of other experts, and free what is left over.

        Args:
            old: the layer with the experts before.
            new: the layer with as many experts, packed alike.
        """

    def drop_tables(self) -> None:  # noqa: B027
        """Free cached data of all layers' experts, when the weights leave memory."""

    def moe_combine(self, y_XH: Tensor, permutation: Permutation) -> Tensor:
        """Undo `moe_permute`: sum the rows of each token in the order of its choices: [T, H]."""
        return moe.combine(y_XH, permutation)

    def pack_rows(
        self, x_TH: Tensor, row_X: Tensor, score_X: Tensor | None, format: RowFormat
    ) -> Tensor:
        """Rows of x as bytes, to send to the ranks of the experts.

        Args:
            x_TH: rows of any float dtype.
            row_X: int32, index in x of each sent row.
            score_X: float32, factor of each sent row, applied in float32; None for no factor.
            format: format of the bytes, defined in `kernels.expert_rows`.

        Returns:
            uint8 [X, B].
        """
        rows_XH = x_TH.index_select(0, row_X)
        if score_X is not None:
            rows_XH = rows_XH.float() * score_X[:, None]
        return expert_rows.pack(rows_XH, format)

    def unpack_rows(
        self, rows_XB: Tensor, row_Y: Tensor, size: int, format: RowFormat, dtype: torch.dtype
    ) -> Tensor:
        """Undo `pack_rows`: numbers [Y, size] of `dtype`; row y comes from rows[row_Y[y]].

        Raises:
            ValueError: the rows have another size or format.
        """
        expert_rows.check(rows_XB, size, format)
        return expert_rows.unpack(rows_XB.index_select(0, row_Y), format, dtype)

    def moe_block(
        self, x_TH: Tensor, layer: MoELayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Norm, shared expert, and the local routed experts: a partial result [T, H].

        Llama 4: the score multiplies the input of the expert, before SwiGLU, and not the output:
        shared(h) + sum of expert(score * h), with h the normed x.
        """
        h_TH = self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        return adapted.moe(self, h_TH, layer, adapters)

    # Blocks: several ops in a call. A backend overrides a block where a fused kernel is faster.

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Norm, qkv, RoPE, cache write, attention, output projection: a partial result [T, H]."""
        h_TH = self.rms_norm(x_TH, layer.attn_norm_H, layer.eps)
        qkv_TE = adapted.linear(self, h_TH, layer, "qkv", batch.adapters)
        q_TND = self.rope_write_kv(qkv_TE, layer, kv, kv_layer, batch)
        out_TE = self.paged_attention(
            q_TND, layer.softmax_scale, kv, kv_layer, batch, layer.style.mask
        )
        return adapted.linear(self, out_TE, layer, "o", batch.adapters)

    def mlp_block(
        self, x_TH: Tensor, layer: DenseLayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Norm, gate and up, SwiGLU, down: a partial result [T, H]."""
        h_TH = self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        return adapted.gated_mlp(self, h_TH, layer, adapters)

    def mlp_rows(self, x_TH: Tensor, layer: DenseLayer) -> InputRows:
        """The norm before a layer's MLP, as `gated_mlp` takes it.

        A backend may round the rows for the MLP's product in the same launch; for a layer with
        experts `unrounded` gives the rows of the norm itself.
        """
        return self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)

    def gated_mlp(
        self, h: InputRows, layer: DenseLayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """Gate and up, SwiGLU, down, of rows of `mlp_rows`: a partial result [T, H]."""
        return adapted.gated_mlp(self, unrounded(h), layer, adapters)

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
        """Build the pass through a stage's layers: (x [T, H], batch) to x [T, H], maybe in place.

        Built once at load, called once per step.

        Args:
            layers: layers of the stage, in order.
            kv: cache of the layers, in order; None if all layers use `local_kv`.
            reduce: sum over the slices of the stage; None for a single slice.
            local_kv: cache of the layers with chunked attention, in order; None if they use `kv`.
            experts: runs layers with experts; None for `moe_block`.
            taps: functions that read x between layers; None for none.
            reduce_norm: `reduce` fused with what follows; a backend may leave it unused.
            half_sums: `reduce` for steps in two halves, each sum beside products of the other
                half; a backend may leave it unused.
        """
        caches = layer_caches(layers, kv, local_kv)
        reads = dict(taps or {})
        routed = self.moe_block if experts is None else experts

        def run(x_TH: Tensor, batch: FlatBatch) -> Tensor:
            for i, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
                if i in reads:
                    reads[i](x_TH)
                part = self.attention_block(x_TH, layer, cache.kv, cache.index, cache.batch(batch))
                x_TH += part if reduce is None else reduce(part)
                if isinstance(layer, MoELayer):
                    part = routed(x_TH, layer, batch.adapters)
                else:
                    part = self.mlp_block(x_TH, layer, batch.adapters)
                x_TH += part if reduce is None else reduce(part)
            if len(layers) in reads:
                reads[len(layers)](x_TH)
            return x_TH

        return run

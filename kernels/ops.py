"""The op list: every operation a model is made of, declared once.

A backend is a subclass of `Ops`. `reference` defines each op in plain torch; `cpu` (C++) and
`triton` (CUDA) compute the same numbers faster. A model holds an `Ops` and never names a backend.

This module knows tensors. It refuses to know models, checkpoints, processes and requests.

Shape legend, used as suffixes of tensor names
    T  tokens of the flat batch (prefill chunks and decodes together)
    S  sequences of the flat batch, in batch order; sequence s owns tokens
       query_start[s] .. query_start[s + 1]
    R  rows whose logits are wanted
    H  hidden size          F  MLP columns held here     V  vocabulary rows held here
    N  query heads here     K  key/value heads here      D  head_dim
    B  blocks of a sequence's table                      P  slots in a block (block size)

Activations between ops are float32 on CPU whatever the weights' dtype (residual stream, norms,
softmax and accumulations stay float32; an op may round a product's *input* to the weights'
dtype), and the weights' dtype on CUDA.

**Same tokens.** Each output row depends on its own inputs only, bit for bit: the order of
reduction may depend on the shapes of weights and on a row's own context, never on the number of
other rows, on where prefill chunks were cut, or on the number of threads. `reference` keeps this
to rounding only, since torch's products choose their kernels by batch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arriero.kernels import expert_rows as wire
from arriero.kernels import moe
from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.expert_rows import Wire
from arriero.kernels.moe import Permutation, Routing
from arriero.kernels.quant import ProductInputs, QuantizedWeight, quantize_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatBatch:
    """Where the tokens of one step sit. Made once a step, read by every layer.

    All index tensors are int32 and live on the device.

    Attributes:
        positions_T: global position of each token in its sequence.
        query_start_S1: shape [S + 1], first token of each sequence in the flat batch.
        context_S: tokens of the sequence in the cache once this step's are written.
        block_table_SB: block ids by sequence, in order; entries past the context are arbitrary.
        slots_T: where each token's key and value go: block id * block size + offset.
        cos_TD: shape [T, D / 2], float32; RoPE cosines at `positions_T`.
        sin_TD: shape [T, D / 2], float32.
        max_query: the longest query of the batch (host integer: no device sync to get it).
        max_context: the longest context of the batch.
        local: the same tokens as layers with chunked attention see them, where these keep a cache
            of their own. Positions there count from a multiple of the chunk size, sequence by
            sequence, so that tables stay short; `cos_TD` and `sin_TD` are of global positions.
    """

    positions_T: Tensor
    query_start_S1: Tensor
    context_S: Tensor
    block_table_SB: Tensor
    slots_T: Tensor
    cos_TD: Tensor
    sin_TD: Tensor
    max_query: int
    max_context: int
    local: FlatBatch | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheSpec:
    """Shape of the paged cache of the layers held here.

    With dtype int8, each head's key and each head's value of a token is 127 levels of either
    sign with a float32 scale of its own, the greatest magnitude / 127; stored numbers are rounded
    half to even, and a head of zeros has scale 0.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def canonical_dim(self) -> int:
        """Last dimension of the canonical layout: D; for int8 D + 4.

        The four bytes after an int8 vector are its float32 scale, little-endian.
        """
        return self.head_dim + 4 if self.dtype == torch.int8 else self.head_dim


class KVCache(ABC):
    """The paged cache of the layers held here. Its inner layout belongs to the backend."""

    spec: KVCacheSpec

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated, exactly."""

    @abstractmethod
    def read(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """Copy blocks out in the canonical layout [len(blocks), 2 (k, v), K, P, D].

        In the cache's dtype; see `KVCacheSpec.canonical_dim` for int8.
        """

    @abstractmethod
    def write(self, layer: int, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in from the canonical layout; for int8 of that dtype, else of any float."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A packed product y = x Wᵀ + b. Made by `Ops.pack_linear`; only its backend reads `packed`.

    With `inputs`, W multiplies x as those say; see `Ops.pack_product`.
    """

    out_features: int
    in_features: int
    packed: Any
    bias: Tensor | None
    nbytes: int
    inputs: ProductInputs | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocab:
    """Packed vocabulary rows [first_row, first_row + num_rows): embedding, head, or both."""

    first_row: int
    num_rows: int
    hidden_size: int
    packed: Any
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionStyle:
    """What a layer's attention does beyond Llama 3's; the defaults are Llama 3's.

    Attributes:
        rope: halves: element i pairs with i + D / 2. pairs: element 2i pairs with 2i + 1 (Llama 4
            as its checkpoints store it). none: positions are not encoded.
        qk_norm: after RoPE each head of q and k is divided by its root mean square (weightless,
            with the layer's eps).
        query_scale: (a, f): q at position p is multiplied by 1 + a * ln(1 + floor((p + 1) / f)),
            last of all (Llama 4's attention temperature); None for off.
        visible: which earlier keys a query sees.
    """

    rope: Literal["halves", "pairs", "none"] = "halves"
    qk_norm: bool = False
    query_scale: tuple[float, float] | None = None
    visible: AttentionMaskSpec = FULL_ATTENTION


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseLayer:
    """Weights of one dense decoder layer as held by this slice.

    Attributes:
        attn_norm_H: float32.
        qkv: rows are all query heads held here, then key heads, then value heads.
        o: this slice's columns of the output projection (its bias on one slice only).
        mlp_norm_H: float32.
        gate_up: rows are the gate columns held here, then the up columns.
        down: this slice's columns.
        num_q_heads, num_kv_heads, head_dim: of this slice; num_q_heads % num_kv_heads == 0.
        softmax_scale: multiplies q·k.
        eps: of both norms.
        style: departures from Llama 3's attention. A backend whose fused blocks know only the
            default must take the ops one by one for any other.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MoELayer(DenseLayer):
    """A decoder layer with routed experts (Llama 4).

    It is a dense layer whose MLP, `gate_up` and `down`, is the shared expert, and

    Attributes:
        router: rows are all the model's experts.
        experts_gate_up: of each expert held here, gate rows and then up rows.
        experts_down: of each expert held here.
        first_expert: global id of the first of them; they are consecutive.
        top_k: experts that a token is sent to.
        index: the layer's global number, for those who route for several.
    """

    router: Linear
    experts_gate_up: Sequence[Linear]
    experts_down: Sequence[Linear]
    first_expert: int
    top_k: int
    index: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRows:
    """Sampling parameters of R rows, one tensor a field, on the device of the logits.

    An optional field is None when no row of the batch uses it, so the common case costs nothing.

    Attributes:
        temperature_R: float32; 0 means greedy.
        top_k_R: int32; 0 means off.
        top_p_R: float32; 1 means off.
        min_p_R: float32; 0 means off.
        seed_R: int64; the draw is a pure function of (seed, position).
        position_R: int64; position that the sampled token will take.
        repetition_R: float32; 1 means off. HF's definition, over prompt and output tokens.
        presence_R: float32; 0 means off. Over output tokens (OpenAI's definition).
        frequency_R: float32; 0 means off. Over output tokens.
        seen_RV: bool; the token occurs in the prompt or the output. Present with repetition_R.
        counts_RV: int32; occurrences in the output. Present with presence_R or frequency_R.
        bias: (row int64 [N], token int64 [N], value float32 [N]): added to the logits; a value of
            -inf bans the token.
        allowed_RV: bool; False bans the token.
        num_logprobs: how many top log-probabilities to return; -1 for none at all, 0 for the
            chosen token's only.
        all_greedy: every row has temperature 0 (host knowledge, to skip the draw).
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor
    repetition_R: Tensor | None = None
    presence_R: Tensor | None = None
    frequency_R: Tensor | None = None
    seen_RV: Tensor | None = None
    counts_RV: Tensor | None = None
    bias: tuple[Tensor, Tensor, Tensor] | None = None
    allowed_RV: Tensor | None = None
    num_logprobs: int = -1
    all_greedy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """What a draw gave.

    Attributes:
        tokens_R: int32.
        logprobs_R: float32, of the chosen tokens, from the raw logits (before penalties, bias and
            temperature); None when not asked for.
        top_tokens_RN: int32, by falling log-probability; None when not asked for.
        top_logprobs_RN: float32.
    """

    tokens_R: Tensor
    logprobs_R: Tensor | None = None
    top_tokens_RN: Tensor | None = None
    top_logprobs_RN: Tensor | None = None


Reduce = Callable[[Tensor], Tensor]
"""Sums a partial [T, H] over the slices of a tensor-parallel stage; may work in place."""

Experts = Callable[[Tensor, "MoELayer"], Tensor]
"""As `Ops.moe_block`, where other ranks hold some of the experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """Where one layer of a stage keeps its keys and values.

    Attributes:
        kv: the cache.
        index: the layer's place in it.
        local: whether it is the chunked layers' own, which `FlatBatch.local` describes.
    """

    kv: KVCache
    index: int
    local: bool

    def batch(self, batch: FlatBatch) -> FlatBatch:
        """The batch as this layer sees it."""
        if not self.local:
            return batch
        assert batch.local is not None, "layers with a cache of their own need their own table"
        return batch.local


def layer_caches(
    layers: Sequence[DenseLayer], kv: KVCache | None, local_kv: KVCache | None
) -> list[LayerCache]:
    """Each layer's place: layers with chunked attention in `local_kv`, where there is one."""
    found: list[LayerCache] = []
    counts = {True: 0, False: 0}
    for layer in layers:
        local = local_kv is not None and layer.style.visible.chunk_size > 0
        cache = local_kv if local else kv
        assert cache is not None, "a stage has a cache for each kind of layer that it holds"
        found.append(LayerCache(kv=cache, index=counts[local], local=local))
        counts[local] += 1
    return found


class Ops(ABC):
    """The op list. Subclasses are backends; `arriero.kernels.select.ops_for` picks one."""

    name: str
    device: torch.device
    capturable: bool = False
    """Whether a decode step may be captured in a CUDA graph: no op of one waits for the device."""

    # Packing: done once at load; the packed form is the only one kept.

    @abstractmethod
    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack matrices [out_i, in] by rows, convert to `dtype` and pack them.

        The inputs may be views of mapped files; they are not kept.
        """

    @abstractmethod
    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Pack vocabulary rows so that both `embed` and `logits` can read them."""

    def pack_quantized(self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack quantized matrices by rows and pack them; `linear` takes the result.

        The product is y = x Ŵᵀ + b with Ŵ exactly `QuantizedWeight.dequantize()` of the stack: x
        may be rounded to bfloat16, Ŵ may not be rounded further (levels are exact in bfloat16, so
        a backend multiplies levels and applies scales to float32 sums). All kinds of
        `kernels.quant` are declared; a backend may lack some.

        Raises:
            ValueError: the matrices differ in kind, group size or columns.
            NotImplementedError: this backend has no kernel for the kind.
        """
        raise NotImplementedError(
            f"kernels={self.name!r} has no product for {weights[0].kind} weights; "
            "load the model without quantization or use kernels='reference'"
        )

    def pack_product(
        self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None, inputs: ProductInputs
    ) -> Linear:
        """`pack_quantized` for a product that reorders or rounds its inputs.

        `linear` and `grouped_linear` take the result. With a bound the product is
        y = scale_T * (q_TI Qᵀ) * scale_O + b of the float8 numbers q of `quantize_rows` and Q
        stored. Products of float8 numbers are exact in float32, and sums of up to 2**17 of them
        in float64, which is how `reference` defines their sum; the others sum in float32.

        Raises:
            ValueError, NotImplementedError: as `pack_quantized`.
        """
        plain = self.pack_quantized(weights, None)
        bias = None if bias_O is None else bias_O.to(self.device, torch.float32, copy=True)
        if inputs.order_I is not None:
            inputs = replace(inputs, order_I=inputs.order_I.to(self.device))
        return replace(
            plain,
            in_features=inputs.num_inputs,
            bias=bias,
            nbytes=plain.nbytes + inputs.nbytes + (0 if bias is None else bias.nbytes),
            inputs=inputs,
        )

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Pack quantized vocabulary rows for `embed` and `logits`; meaning as `pack_quantized`.

        Raises:
            NotImplementedError: this backend has no kernel for the kind.
        """
        raise NotImplementedError(
            f"kernels={self.name!r} has no vocabulary of {weight.kind} weights; "
            "keep the embedding unquantized or use kernels='reference'"
        )

    def offloading(self, folder: Path) -> AbstractContextManager[None]:
        """Products packed within stay out of the device's memory and stream in ahead of use.

        Args:
            folder: on a disk with room for them, where memory of the host is the device's.

        Raises:
            NotImplementedError: this backend keeps all weights on its device.
        """
        raise NotImplementedError(
            f"kernels={self.name!r} keeps all weights on its device; use offload_layers=0"
        )

    @abstractmethod
    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache."""

    # Operations.

    @abstractmethod
    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table, [T, H]; a token whose row is held elsewhere gives zeros."""

    @abstractmethod
    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm, then the product with the rows held here: float32 [R, V]."""

    @abstractmethod
    def linear(self, x_TI: Tensor, w: Linear) -> Tensor:
        """The product x Wᵀ + b: [T, O]."""

    def quantize_rows(self, x_TI: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Round rows to float8: q float8_e4m3fn [T, I] and scale float32 [T, 1].

        The definition is `kernels.quant.quantize_rows`.
        """
        return quantize_rows(x_TI, bound)

    def linear_of_inputs(self, x_TI: Tensor, w: Linear) -> Tensor:
        """`linear` of a product with `inputs`, by way of one without."""
        assert w.inputs is not None, "made by pack_product"
        x_TI = x_TI if w.inputs.order_I is None else x_TI.index_select(1, w.inputs.order_I)
        plain = replace(w, in_features=x_TI.shape[1], inputs=None, bias=None)
        if w.inputs.bound is None:
            y_TO = self.linear(x_TI, plain)
        else:
            q_TI, scale_T1 = self.quantize_rows(x_TI, w.inputs.bound)
            y_TO = self.linear(q_TI.float(), plain).mul_(scale_T1)
        return (y_TO if w.bias is None else y_TO.add_(w.bias)).to(x_TI.dtype)

    def grouped_linear_of_inputs(
        self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor
    ) -> Tensor:
        """`grouped_linear` of products that reorder or round their inputs, by way of ones without.

        Raises:
            ValueError: they do not all round alike, or some reorder and some do not.
        """
        inputs = [one.inputs for one in experts if one.inputs is not None]
        kinds = {(one.bound, one.order_I is None) for one in inputs}
        if len(inputs) != len(experts) or len(kinds) != 1:
            raise ValueError("grouped_linear: experts of one layer reorder or round inputs alike")
        dtype, bound = x_XI.dtype, inputs[0].bound
        orders = [one.order_I for one in inputs if one.order_I is not None]
        if orders:  # each row as its own expert wants it
            row_X = torch.arange(len(x_XI), device=x_XI.device)
            expert_X = torch.bucketize(row_X, starts_E1[1:-1].long(), right=True)
            x_XI = x_XI.gather(1, torch.stack(orders)[expert_X])
        plain = [replace(one, in_features=x_XI.shape[1], inputs=None) for one in experts]
        if bound is None:
            return self.grouped_linear(x_XI, plain, starts_E1)
        q_XI, scale_X1 = self.quantize_rows(x_XI, bound)
        y_XO = self.grouped_linear(q_XI.float(), plain, starts_E1)
        return y_XO.mul_(scale_X1).to(dtype)

    @abstractmethod
    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm: x / sqrt(mean(x²) + eps), float32 inside, times the weight.

        Source: Zhang and Sennrich, 2019.
        """

    @abstractmethod
    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """silu(first half) * second half: [T, 2F] to [T, F] (SwiGLU, Shazeer 2020)."""

    @abstractmethod
    def rope_write_kv(
        self, qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Rotate q and k, write k and v to their slots; returns q [T, N, D].

        RoPE (Su 2021) by halves, as Hugging Face stores Llama: element i pairs with i + D / 2.
        `layer.style` may ask for another layout, and for the QK norm and query scale after it.
        """

    @abstractmethod
    def paged_attention(
        self,
        q_TND: Tensor,
        scale: float,
        kv: KVCache,
        kv_layer: int,
        batch: FlatBatch,
        visible: AttentionMaskSpec = FULL_ATTENTION,
    ) -> Tensor:
        """Causal attention of each token over its own sequence's blocks: [T, N * D].

        Paged attention (Kwon 2023) over a flat batch. Token at position p sees keys 0..p, or what
        `visible` leaves of them. Blocks of a sequence that hold none of its first query's keys
        may be freed, but for those of `sinks`: their table entries are arbitrary and are not read.
        """

    @abstractmethod
    def sample(self, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        """Draw one token a row. May overwrite the logits.

        Order: bias and allowed sets, penalties, temperature, then the filters min-p, top-k and
        top-p in that order, then the draw: inverse CDF, in vocabulary order, of one uniform from
        Philox-4x32-10 (Salmon 2011) keyed by the seed with the position as counter.

        The definition, so that every backend draws the same token:

        * Penalties: repetition, then frequency, then presence. Greedy rows (temperature 0) take
          the greatest logit after bias, bans and penalties; of equal ones the lowest id.
        * A token's weight is the integer floor(exp((x - max x) / temperature) * 2**44), exp and
          division in float64. All sums of weights are exact int64, in no particular order.
        * min-p keeps weights >= min_p * 2**44. top-k keeps weights >= the k-th greatest. top-p
          keeps weights >= the last one, from the greatest down, above which lies less than
          p * (sum of the weights still kept). Tokens equal to the last one kept are kept.
        * The draw takes the first token, by rising id, whose inclusive sum of weights exceeds
          min(floor(u * sum), sum - 1); u * sum in float64, u of `kernels.philox.uniform`.
        * A row whose greatest logit is not finite once banned tokens are gone (all banned, or
          NaN) gives token -1, with log-probability -inf: nothing may be sampled.
        """

    # Experts. Shape legend: kernels/moe.py. The defaults are the definition, over `linear`.

    def moe_route(self, x_TH: Tensor, router: Linear, top_k: int) -> Routing:
        """Choose each token's experts: the greatest logits, scored by their sigmoids (Llama 4)."""
        return moe.route(self.linear(x_TH, router).float(), top_k)

    def moe_permute(self, routing: Routing, first_expert: int, num_experts: int) -> Permutation:
        """Order the (token, expert) pairs whose expert is held here by expert, then by token."""
        return moe.permute(routing, first_expert, num_experts)

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """Rows starts[e] .. starts[e + 1] times the e-th matrix: [X, O].

        All experts do the same to their inputs.
        """
        counts = starts_E1.diff().tolist()
        parts = [
            self.linear(x, expert)
            for x, expert in zip(torch.split(x_XI, counts), experts, strict=True)
            if x.shape[0]
        ]
        return torch.cat(parts) if parts else x_XI.new_empty(0, experts[0].out_features)

    def forget_experts(self, layer: MoELayer) -> None:  # noqa: B027
        """Give back what is kept of a layer's experts, whose place others have taken."""

    def moe_combine(self, y_XH: Tensor, permutation: Permutation) -> Tensor:
        """Undo `moe_permute`: sum each token's rows, in the order of its choices: [T, H]."""
        return moe.combine(y_XH, permutation)

    def pack_rows(
        self, x_TH: Tensor, row_X: Tensor, score_X: Tensor | None, format: Wire
    ) -> Tensor:
        """What is sent to the ranks that hold the experts: rows of x, as bytes.

        Args:
            x_TH: of any float type.
            row_X: int32, which row of x each row sent is.
            score_X: float32, what multiplies it, in float32; None for nothing.
            format: see `kernels.wire`, which defines the bytes.

        Returns:
            uint8 [X, B].
        """
        rows_XH = x_TH.index_select(0, row_X)
        if score_X is not None:
            rows_XH = rows_XH.float() * score_X[:, None]
        return wire.pack(rows_XH, format)

    def unpack_rows(
        self, rows_XB: Tensor, row_Y: Tensor, size: int, format: Wire, dtype: torch.dtype
    ) -> Tensor:
        """What `pack_rows` gave, as numbers again: [Y, size] of `dtype`, row y from rows[row_Y[y]].

        Raises:
            ValueError: rows of another size or format.
        """
        wire.check(rows_XB, size, format)
        return wire.unpack(rows_XB.index_select(0, row_Y), format, dtype)

    def moe_block(self, x_TH: Tensor, layer: MoELayer) -> Tensor:
        """Norm, shared expert, and the routed experts held here: a partial [T, H].

        Llama 4: the score multiplies the expert's input, before its SwiGLU, and not its output:
        shared(h) + sum of expert(score * h), h being the normed x.
        """
        h_TH = self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        routing = self.moe_route(h_TH, layer.router, layer.top_k)
        order = self.moe_permute(routing, layer.first_expert, len(layer.experts_down))
        h_XH = h_TH[order.token_X.long()] * order.score_X[:, None].to(h_TH.dtype)
        y_XF2 = self.grouped_linear(h_XH, layer.experts_gate_up, order.starts_E1)
        y_XH = self.grouped_linear(self.silu_mul(y_XF2), layer.experts_down, order.starts_E1)
        shared_TH = self.linear(self.silu_mul(self.linear(h_TH, layer.gate_up)), layer.down)
        return shared_TH + self.moe_combine(y_XH, order)

    # Blocks: several ops in one call. A backend overrides them where fusing pays.

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """Norm, qkv, RoPE, cache write, attention, output projection: a partial [T, H]."""
        qkv_TE = self.linear(self.rms_norm(x_TH, layer.attn_norm_H, layer.eps), layer.qkv)
        q_TND = self.rope_write_kv(qkv_TE, layer, kv, kv_layer, batch)
        out_TE = self.paged_attention(
            q_TND, layer.softmax_scale, kv, kv_layer, batch, layer.style.visible
        )
        return self.linear(out_TE, layer.o)

    def mlp_block(self, x_TH: Tensor, layer: DenseLayer) -> Tensor:
        """Norm, gate and up, SiLU product, down: a partial [T, H]."""
        h_TH = self.rms_norm(x_TH, layer.mlp_norm_H, layer.eps)
        return self.linear(self.silu_mul(self.linear(h_TH, layer.gate_up)), layer.down)

    def decoder(
        self,
        layers: Sequence[DenseLayer],
        kv: KVCache | None,
        reduce: Reduce | None,
        *,
        local_kv: KVCache | None = None,
        experts: Experts | None = None,
    ) -> Callable[[Tensor, FlatBatch], Tensor]:
        """Build the pass through a stage's layers: (x [T, H], batch) to x [T, H], maybe in place.

        Built once at load, called once a step.

        Args:
            layers: of the stage, in order.
            kv: cache of the layers, in their order; None if `local_kv` holds them all.
            reduce: None where one slice holds the stage.
            local_kv: cache of those with chunked attention, in their order; None: `kv` holds them.
            experts: what runs layers with experts; None for `moe_block`.
        """
        caches = layer_caches(layers, kv, local_kv)
        routed = self.moe_block if experts is None else experts

        def run(x_TH: Tensor, batch: FlatBatch) -> Tensor:
            for layer, cache in zip(layers, caches, strict=True):
                part = self.attention_block(x_TH, layer, cache.kv, cache.index, cache.batch(batch))
                x_TH += part if reduce is None else reduce(part)
                if isinstance(layer, MoELayer):
                    part = routed(x_TH, layer)
                else:
                    part = self.mlp_block(x_TH, layer)
                x_TH += part if reduce is None else reduce(part)
            return x_TH

        return run

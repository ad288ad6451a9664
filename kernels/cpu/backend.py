"""The CPU backend: the op list on C++ kernels, one call for all layers of a stage.

Knows which C function computes which op; refuses to know models. What it draws from logits beyond
the greatest one is the reference's, by definition the same.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arriero.kernels.cpu.cache import CpuKVCache
from arriero.kernels.cpu.library import Batch, Layer, Style, load
from arriero.kernels.cpu.weights import Packed, pack_plain, pack_quantized
from arriero.kernels.ops import (
    DenseLayer,
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
)
from arriero.kernels.quant import QuantizedWeight
from arriero.kernels.reference import sampling

_ROPE = {"halves": 0, "pairs": 1, "none": 2}


def available_threads() -> int:
    """CPUs that this process may run on, or OMP_NUM_THREADS where that is lower."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:
        cpus = os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cpus, int(limit)) if limit.isdecimal() and int(limit) > 0 else cpus


class CpuOps(Ops):
    """The op list on the CPU.

    Where the CPU multiplies bf16 pairs natively, the inputs of products with bf16 weights are
    rounded to bf16 (as the reference does); `exact_inputs` keeps them float32 at half the speed.
    """

    name = "cpu"

    def __init__(
        self,
        device: torch.device,
        threads: int | None = None,
        *,
        exact_inputs: bool = False,
        variant: str | None = None,
    ) -> None:
        """Load the library and start the threads.

        Raises:
            RuntimeError: no library can be used here.
            ValueError: the device is no CPU, or `threads` is not positive.
        """
        if device.type != "cpu":
            raise ValueError(f"kernels='cpu' runs on device 'cpu', not {device}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        self.device = device
        self.library = load(variant)
        self.num_threads = available_threads() if threads is None else threads
        # What torch still computes between calls is small, and its own threads would spin on the
        # cores that these need.
        torch.set_num_threads(1)
        self._machine = self.library.machine(self.num_threads, exact_inputs)

    # Packing.

    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack by rows and pack; see `Ops.pack_linear`."""
        return _linear(pack_plain(self.library, self._machine, weights_OI, bias_O, dtype))

    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Pack rows; `embed` gathers from the same panels that `logits` multiplies."""
        packed = pack_plain(self.library, self._machine, [weight_VH], None, dtype)
        return _vocab(packed, first_row)

    def pack_quantized(self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack by rows and pack; see `Ops.pack_quantized`."""
        return _linear(pack_quantized(self.library, self._machine, weights, bias_O))

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Pack rows; see `Ops.pack_quantized_vocab`."""
        return _vocab(pack_quantized(self.library, self._machine, [weight], None), first_row)

    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache of zeros."""
        if device.type != "cpu":
            raise ValueError(f"kernels='cpu' keeps its cache on device 'cpu', not {device}")
        return CpuKVCache(self.library, spec)

    # Operations.

    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table, float32; see `Ops.embed`."""
        tokens_T = tokens_T.to(torch.int32).contiguous()
        out_TH = torch.empty(tokens_T.shape[0], vocab.hidden_size)
        self._call(
            "embed",
            _packed(vocab.packed).address,
            vocab.first_row,
            tokens_T.data_ptr(),
            tokens_T.shape[0],
            out_TH.data_ptr(),
        )
        return out_TH

    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm and product in one pass; see `Ops.logits`."""
        x_RH = _rows("logits", x_RH, vocab.hidden_size)
        norm_H = _vector("norm_H", norm_H, vocab.hidden_size)
        out_RV = torch.empty(x_RH.shape[0], vocab.num_rows)
        self._call(
            "logits",
            _packed(vocab.packed).address,
            norm_H.data_ptr(),
            eps,
            x_RH.data_ptr(),
            x_RH.stride(0),
            x_RH.shape[0],
            out_RV.data_ptr(),
        )
        return out_RV

    def linear(self, x_TI: Tensor, w: Linear) -> Tensor:
        """The product; see `Ops.linear`."""
        x_TI = _rows("linear", x_TI, w.in_features)
        out_TO = torch.empty(x_TI.shape[0], w.out_features)
        self._call(
            "linear",
            _packed(w.packed).address,
            x_TI.data_ptr(),
            x_TI.stride(0),
            x_TI.shape[0],
            out_TO.data_ptr(),
        )
        return out_TO

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        x_TH = _rows("rms_norm", x_TH, weight_H.shape[0])
        weight_H = _vector("weight_H", weight_H, weight_H.shape[0])
        out_TH = torch.empty(x_TH.shape)
        self._call(
            "rms_norm",
            x_TH.data_ptr(),
            x_TH.stride(0),
            *x_TH.shape,
            weight_H.data_ptr(),
            eps,
            out_TH.data_ptr(),
        )
        return out_TH

    def silu_mul(self, gate_up_TF2: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate_up_TF2 = _rows("silu_mul", gate_up_TF2, gate_up_TF2.shape[1])
        size = gate_up_TF2.shape[1] // 2
        out_TF = torch.empty(gate_up_TF2.shape[0], size)
        self._call(
            "silu_mul",
            gate_up_TF2.data_ptr(),
            gate_up_TF2.stride(0),
            gate_up_TF2.shape[0],
            size,
            out_TF.data_ptr(),
        )
        return out_TF

    def rope_write_kv(
        self, qkv_TE: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.rope_write_kv`; works on a copy of `qkv_TE`."""
        _check_cache(layer, kv)
        width = (layer.num_q_heads + 2 * layer.num_kv_heads) * layer.head_dim
        qkv_TE = _rows("rope_write_kv", qkv_TE, width).clone(memory_format=torch.contiguous_format)
        struct = _batch(batch, qkv_TE.shape[0], layer.head_dim)
        layer_struct = _bare_layer(layer)
        self._call(
            "rope_write",
            qkv_TE.data_ptr(),
            width,
            ctypes.addressof(layer_struct),
            _cache(kv).address,
            kv_layer,
            ctypes.addressof(struct),
        )
        num_q = layer.num_q_heads * layer.head_dim
        q_TND: Tensor = qkv_TE[:, :num_q].view(-1, layer.num_q_heads, layer.head_dim)
        return q_TND

    def paged_attention(
        self,
        q_TND: Tensor,
        scale: float,
        kv: KVCache,
        kv_layer: int,
        batch: FlatBatch,
        chunk_size: int = 0,
    ) -> Tensor:
        """See `Ops.paged_attention`."""
        num_tokens, num_heads, head_dim = q_TND.shape
        spec = kv.spec
        if head_dim != spec.head_dim or num_heads % spec.num_kv_heads:
            raise ValueError(
                f"queries of {num_heads} heads of {head_dim} do not fit a cache of "
                f"{spec.num_kv_heads} heads of {spec.head_dim}"
            )
        q_TE = _rows("paged_attention", q_TND.flatten(1), num_heads * head_dim)
        out_TE = torch.empty(num_tokens, num_heads * head_dim)
        struct = _batch(batch, num_tokens, head_dim)
        self._call(
            "paged_attention",
            q_TE.data_ptr(),
            q_TE.stride(0),
            num_heads,
            scale,
            chunk_size,
            _cache(kv).address,
            kv_layer,
            ctypes.addressof(struct),
            out_TE.data_ptr(),
        )
        return out_TE

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """See `Ops.grouped_linear`; the experts have one shape and type."""
        structs = [_packed(expert.packed).struct for expert in experts]
        shapes = {(s.out_features, s.in_features, s.type, s.group) for s in structs}
        if len(shapes) != 1 or starts_E1.shape != (len(structs) + 1,):
            raise ValueError(
                f"grouped_linear: {len(structs)} experts of {len(shapes)} shapes or types with "
                f"{starts_E1.shape[0]} starts; they need one shape, and a start each and an end"
            )
        x_XI = _rows("grouped_linear", x_XI, experts[0].in_features)
        starts_E1 = starts_E1.to(torch.int32).contiguous()
        if int(starts_E1[-1]) != x_XI.shape[0]:
            raise ValueError(
                f"grouped_linear: starts end at {int(starts_E1[-1])} for {x_XI.shape[0]} rows"
            )
        pointers = (ctypes.c_void_p * len(structs))(*(ctypes.addressof(s) for s in structs))
        out_XO = torch.empty(x_XI.shape[0], experts[0].out_features)
        self._call(
            "grouped_linear",
            ctypes.addressof(pointers),
            starts_E1.data_ptr(),
            len(structs),
            x_XI.data_ptr(),
            x_XI.stride(0),
            out_XO.data_ptr(),
        )
        return out_XO

    def sample(self, logits_RV: Tensor, rows: SamplingRows) -> Sampled:
        """See `Ops.sample`. A greedy batch without penalties is one pass over the logits."""
        plain = (
            rows.all_greedy
            and rows.num_logprobs < 0
            and rows.bias is None
            and rows.allowed_RV is None
            and rows.repetition_R is None
            and rows.presence_R is None
            and rows.frequency_R is None
        )
        if not plain:
            return sampling.sample(logits_RV, rows)
        logits_RV = _rows("sample", logits_RV, logits_RV.shape[1])
        tokens_R = torch.empty(logits_RV.shape[0], dtype=torch.int32)
        self._call(
            "argmax",
            logits_RV.data_ptr(),
            logits_RV.stride(0),
            *logits_RV.shape,
            tokens_R.data_ptr(),
        )
        return Sampled(tokens_R=tokens_R)

    # Blocks.

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.attention_block`."""
        _check_cache(layer, kv)
        struct, _kept = _layer(layer)
        return self._attention_block(struct, layer, x_TH, _cache(kv), kv_layer, batch)

    def mlp_block(self, x_TH: Tensor, layer: DenseLayer) -> Tensor:
        """See `Ops.mlp_block`."""
        struct, _kept = _layer(layer)
        return self._mlp_block(struct, layer, x_TH)

    def decoder(
        self, layers: Sequence[DenseLayer], kv: KVCache, reduce: Reduce | None
    ) -> Callable[[Tensor, FlatBatch], Tensor]:
        """See `Ops.decoder`.

        One call a step for dense layers without `reduce`; with it, or with experts, one a block.
        """
        layers = tuple(layers)
        for layer in layers:
            _check_cache(layer, kv)
        if len(layers) > kv.spec.num_layers:
            raise ValueError(
                f"{len(layers)} layers do not fit a cache of {kv.spec.num_layers} layers"
            )
        cache = _cache(kv)
        structs = (Layer * len(layers))()
        kept = []  # tensors behind the pointers
        for i, layer in enumerate(layers):
            structs[i], tensors = _layer(layer)
            kept.append(tensors)

        def run(x_TH: Tensor, batch: FlatBatch) -> Tensor:
            if not layers:
                return x_TH
            x_TH = _rows("decoder", x_TH, layers[0].qkv.in_features).contiguous()
            struct = _batch(batch, x_TH.shape[0], layers[0].head_dim)
            self._call(
                "decoder",
                ctypes.addressof(structs),
                len(layers),
                cache.address,
                ctypes.addressof(struct),
                x_TH.data_ptr(),
            )
            return x_TH

        def run_blocks(x_TH: Tensor, batch: FlatBatch) -> Tensor:
            for i, layer in enumerate(layers):
                part = self._attention_block(structs[i], layer, x_TH, cache, i, batch)
                x_TH += part if reduce is None else reduce(part)
                if isinstance(layer, MoELayer):
                    part = self.moe_block(x_TH, layer)
                else:
                    part = self._mlp_block(structs[i], layer, x_TH)
                x_TH += part if reduce is None else reduce(part)
            return x_TH

        dense = not any(isinstance(layer, MoELayer) for layer in layers)
        chosen = run if reduce is None and dense else run_blocks
        chosen.kept = kept  # type: ignore[attr-defined]
        return chosen

    def _attention_block(
        self,
        struct: Layer,
        layer: DenseLayer,
        x_TH: Tensor,
        cache: CpuKVCache,
        kv_layer: int,
        batch: FlatBatch,
    ) -> Tensor:
        x_TH = _rows("attention_block", x_TH, layer.qkv.in_features).contiguous()
        part_TH = torch.empty(x_TH.shape[0], layer.o.out_features)
        batch_struct = _batch(batch, x_TH.shape[0], layer.head_dim)
        self._call(
            "attention_block",
            ctypes.addressof(struct),
            kv_layer,
            cache.address,
            ctypes.addressof(batch_struct),
            x_TH.data_ptr(),
            part_TH.data_ptr(),
        )
        return part_TH

    def _mlp_block(self, struct: Layer, layer: DenseLayer, x_TH: Tensor) -> Tensor:
        x_TH = _rows("mlp_block", x_TH, layer.gate_up.in_features).contiguous()
        part_TH = torch.empty(x_TH.shape[0], layer.down.out_features)
        self._call(
            "mlp_block",
            ctypes.addressof(struct),
            x_TH.shape[0],
            x_TH.data_ptr(),
            part_TH.data_ptr(),
        )
        return part_TH

    def _call(self, name: str, *arguments: object) -> None:
        self.library.call(name, self._machine.handle, *arguments)


def _packed(packed: object) -> Packed:
    assert isinstance(packed, Packed), "a packed matrix belongs to the backend that made it"
    return packed


def _cache(kv: KVCache) -> CpuKVCache:
    assert isinstance(kv, CpuKVCache), "a cache belongs to the backend that made it"
    return kv


def _rows(op: str, x_TE: Tensor, size: int) -> Tensor:
    """Float32 rows with unit stride."""
    if x_TE.ndim != 2 or x_TE.shape[1] != size:
        raise ValueError(f"{op}: rows of shape {tuple(x_TE.shape)}; expected [rows, {size}]")
    if x_TE.dtype != torch.float32:
        x_TE = x_TE.float()
    return x_TE if x_TE.stride(1) == 1 else x_TE.contiguous()


def _vector(name: str, x_H: Tensor, size: int) -> Tensor:
    """A contiguous float32 vector."""
    if x_H.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(x_H.shape)}; expected [{size}]")
    return x_H.detach().to("cpu", torch.float32).contiguous()


def _check_cache(layer: DenseLayer, kv: KVCache) -> None:
    spec = kv.spec
    if (layer.num_kv_heads, layer.head_dim) != (spec.num_kv_heads, spec.head_dim):
        raise ValueError(
            f"a layer of {layer.num_kv_heads} key/value heads of {layer.head_dim} does not fit a "
            f"cache of {spec.num_kv_heads} heads of {spec.head_dim}"
        )


def _layer(layer: DenseLayer) -> tuple[Layer, tuple[Tensor, ...]]:
    """The struct of a layer, and the tensors it points into beyond the packed ones."""
    width = (layer.num_q_heads + 2 * layer.num_kv_heads) * layer.head_dim
    expected = (
        ("qkv rows", layer.qkv.out_features, width),
        ("o columns", layer.o.in_features, layer.num_q_heads * layer.head_dim),
        ("o rows", layer.o.out_features, layer.qkv.in_features),
        ("gate_up columns", layer.gate_up.in_features, layer.qkv.in_features),
        ("gate_up rows", layer.gate_up.out_features, 2 * layer.down.in_features),
        ("down rows", layer.down.out_features, layer.qkv.in_features),
    )
    for name, value, want in expected:
        if value != want:
            raise ValueError(f"layer: {name}={value} where the other parts need {want}")
    norms = (
        _vector("attn_norm_H", layer.attn_norm_H, layer.qkv.in_features),
        _vector("mlp_norm_H", layer.mlp_norm_H, layer.qkv.in_features),
    )
    struct = _bare_layer(layer)
    struct.attn_norm, struct.mlp_norm = norms[0].data_ptr(), norms[1].data_ptr()
    struct.qkv = _packed(layer.qkv.packed).struct
    struct.o = _packed(layer.o.packed).struct
    struct.gate_up = _packed(layer.gate_up.packed).struct
    struct.down = _packed(layer.down.packed).struct
    return struct, norms


def _bare_layer(layer: DenseLayer) -> Layer:
    """A layer's numbers, without its weights."""
    gain, floor = layer.style.query_scale or (0.0, 1.0)
    return Layer(
        num_q_heads=layer.num_q_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        scale=layer.softmax_scale,
        eps=layer.eps,
        style=Style(
            rope=_ROPE[layer.style.rope],
            qk_norm=layer.style.qk_norm,
            eps=layer.eps,
            query_gain=gain,
            query_floor=floor,
            chunk_size=layer.style.chunk_size,
        ),
    )


def _linear(packed: Packed) -> Linear:
    return Linear(
        out_features=packed.struct.out_features,
        in_features=packed.struct.in_features,
        packed=packed,
        bias=None,
        nbytes=packed.nbytes,
    )


def _vocab(packed: Packed, first_row: int) -> Vocab:
    return Vocab(
        first_row=first_row,
        num_rows=packed.struct.out_features,
        hidden_size=packed.struct.in_features,
        packed=packed,
        nbytes=packed.nbytes,
    )


def _batch(batch: FlatBatch, num_tokens: int, head_dim: int) -> Batch:
    """The struct of a batch; its tensors outlive the call that it is made for."""
    num_seqs = batch.context_S.shape[0]
    shapes = (
        ("positions_T", batch.positions_T, (num_tokens,)),
        ("query_start_S1", batch.query_start_S1, (num_seqs + 1,)),
        ("context_S", batch.context_S, (num_seqs,)),
        ("block_table_SB", batch.block_table_SB, (num_seqs, batch.block_table_SB.shape[-1])),
        ("slots_T", batch.slots_T, (num_tokens,)),
        ("cos_TD", batch.cos_TD, (num_tokens, head_dim // 2)),
        ("sin_TD", batch.sin_TD, (num_tokens, head_dim // 2)),
    )
    for name, tensor, shape in shapes:
        dtype = torch.float32 if name in ("cos_TD", "sin_TD") else torch.int32
        strided = shape[-1] > 1 and tensor.stride(-1) != 1
        if tensor.shape != shape or tensor.dtype != dtype or strided:
            raise ValueError(
                f"batch.{name}: {str(tensor.dtype)[6:]} {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}; expected {str(dtype)[6:]} {shape} with unit stride"
            )
    return Batch(
        tokens=num_tokens,
        sequences=num_seqs,
        positions=batch.positions_T.data_ptr(),
        query_start=batch.query_start_S1.data_ptr(),
        context=batch.context_S.data_ptr(),
        block_table=batch.block_table_SB.data_ptr(),
        table_stride=batch.block_table_SB.stride(0),
        table_blocks=batch.block_table_SB.shape[1],
        slots=batch.slots_T.data_ptr(),
        cos=batch.cos_TD.data_ptr(),
        sin=batch.sin_TD.data_ptr(),
        cos_stride=batch.cos_TD.stride(0),
        sin_stride=batch.sin_TD.stride(0),
    )

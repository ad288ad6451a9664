"""Checked C structs and plain tensors from the arguments of the op list.

Knows shapes, dtypes and strides; knows nothing of the computation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.kernels.cpu import library
from arriero.kernels.cpu.cache import CpuKVCache
from arriero.kernels.cpu.library import Batch, Draws, Experts, Layer, Style
from arriero.kernels.cpu.lora import layer_lora, rows_struct
from arriero.kernels.cpu.offload import MappedBytes
from arriero.kernels.cpu.weights import Packed
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.sampling_rows import SamplingRows
from arriero.kernels.sizes import num_mask_words

_ROPE = {"halves": 0, "pairs": 1, "none": 2}


def packed_of(packed: object) -> Packed:
    """The packed matrix of a `Linear` or `Vocab`."""
    assert isinstance(packed, Packed), "a packed matrix belongs to the backend that made it"
    return packed


def cache_of(kv: KVCache) -> CpuKVCache:
    """The cache as a cache of this backend."""
    assert isinstance(kv, CpuKVCache), "a cache belongs to the backend that made it"
    return kv


def float_rows(op: str, x_TE: Tensor, size: int) -> Tensor:
    """Float32 rows with unit stride."""
    if x_TE.ndim != 2 or x_TE.shape[1] != size:
        raise ValueError(f"{op}: rows of shape {tuple(x_TE.shape)}; expected [rows, {size}]")
    if x_TE.dtype != torch.float32:
        x_TE = x_TE.float()
    return x_TE if x_TE.stride(1) == 1 else x_TE.contiguous()


def float_vector(name: str, x_H: Tensor, size: int) -> Tensor:
    """A contiguous float32 vector."""
    if x_H.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(x_H.shape)}; expected [{size}]")
    return x_H.detach().to("cpu", torch.float32).contiguous()


def check_cache(layer: DenseLayer, kv: KVCache) -> None:
    """Raise `ValueError` unless the layer has the heads of the cache."""
    spec = kv.spec
    if (layer.num_kv_heads, layer.head_dim) != (spec.num_kv_heads, spec.head_dim):
        raise ValueError(
            f"a layer of {layer.num_kv_heads} key/value heads of {layer.head_dim} does not fit a "
            f"cache of {spec.num_kv_heads} heads of {spec.head_dim}"
        )


def can_fuse(layer: DenseLayer) -> bool:
    """Whether C++ can run whole blocks of a layer: no weights transform their inputs."""
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return all(linear.inputs is None for linear in linears)


def can_fuse_experts(layer: MoELayer) -> bool:
    """Whether C++ can run the whole block of experts.

    The slice has experts, all of the same kind, none transforms its inputs, and none is on disk:
    experts on disk are read between the ops, when the routing is known.
    """
    linears = (layer.gate_up, layer.down, layer.router)
    experts = (*layer.experts_gate_up, *layer.experts_down)
    if not experts or any(linear.inputs is not None for linear in (*linears, *experts)):
        return False
    if any(packed_of(expert.packed).mapping is not None for expert in experts):
        return False
    return _same_kind(layer.experts_gate_up) and _same_kind(layer.experts_down)


def _same_kind(experts: Sequence[Linear]) -> bool:
    structs = [packed_of(expert.packed).struct for expert in experts]
    return len({(s.out_features, s.in_features, s.type, s.group) for s in structs}) == 1


def mappings_of(layer: DenseLayer) -> tuple[MappedBytes, ...]:
    """The mapped files of a layer's weights, without experts: a step uses only some experts."""
    linears = [layer.qkv, layer.o, layer.gate_up, layer.down]
    mappings = (packed_of(linear.packed).mapping for linear in linears)
    return tuple(mapping for mapping in mappings if mapping is not None)


References = tuple[object, ...]
"""Objects that a struct points to, beside the packed matrices; they must outlive the struct."""


def layer_struct(layer: DenseLayer) -> tuple[Layer, References]:
    """The struct of a layer, without experts."""
    width = (layer.num_q_heads + 2 * layer.num_kv_heads) * layer.head_dim
    _agree(
        ("qkv rows", layer.qkv.out_features, width),
        ("o columns", layer.o.in_features, layer.num_q_heads * layer.head_dim),
        ("o rows", layer.o.out_features, layer.qkv.in_features),
        ("gate_up columns", layer.gate_up.in_features, layer.qkv.in_features),
    )
    norm_H = float_vector("attn_norm_H", layer.attn_norm_H, layer.qkv.in_features)
    struct, references = mlp_struct(layer)
    references += add_head_norms(struct, layer)
    struct.attn_norm = norm_H.data_ptr()
    struct.qkv = packed_of(layer.qkv.packed).struct
    struct.o = packed_of(layer.o.packed).struct
    return struct, (*references, norm_H)


def mlp_struct(layer: DenseLayer) -> tuple[Layer, References]:
    """The struct of a layer's MLP half, without experts."""
    hidden = layer.gate_up.in_features
    _agree(
        ("gate_up rows", layer.gate_up.out_features, 2 * layer.down.in_features),
        ("down rows", layer.down.out_features, hidden),
    )
    norm_H = float_vector("mlp_norm_H", layer.mlp_norm_H, hidden)
    struct = bare_layer_struct(layer)
    struct.mlp_norm = norm_H.data_ptr()
    struct.gate_up = packed_of(layer.gate_up.packed).struct
    struct.down = packed_of(layer.down.packed).struct
    lora = layer_lora(layer)
    if lora is not None:
        struct.lora = ctypes.addressof(lora[0])
    return struct, (norm_H, lora)


def add_head_norms(struct: Layer, layer: DenseLayer) -> References:
    """Add the weights of the norms of q and k to the struct of a layer, if the layer has any."""
    if layer.q_norm_D is None or layer.k_norm_D is None:
        return ()
    q_norm_D = float_vector("q_norm_D", layer.q_norm_D, layer.head_dim)
    k_norm_D = float_vector("k_norm_D", layer.k_norm_D, layer.head_dim)
    struct.style.q_norm, struct.style.k_norm = q_norm_D.data_ptr(), k_norm_D.data_ptr()
    return (q_norm_D, k_norm_D)


def add_experts(struct: Layer, layer: MoELayer) -> References:
    """Add experts to the struct of a layer; `can_fuse_experts` must be true."""
    hidden, num_experts = layer.gate_up.in_features, len(layer.experts_down)
    gate_up, down = layer.experts_gate_up[0], layer.experts_down[0]
    _agree(
        ("router columns", layer.router.in_features, hidden),
        ("experts_gate_up", len(layer.experts_gate_up), num_experts),
        ("experts_gate_up columns", gate_up.in_features, hidden),
        ("experts_gate_up rows", gate_up.out_features, 2 * down.in_features),
        ("experts_down rows", down.out_features, hidden),
    )
    if not 1 <= layer.top_k <= layer.router.out_features:
        raise ValueError(
            f"layer: top_k={layer.top_k} is outside 1 .. {layer.router.out_features} experts"
        )
    pointers = [
        (ctypes.c_void_p * num_experts)(*(packed_of(linear.packed).address for linear in linears))
        for linears in (layer.experts_gate_up, layer.experts_down)
    ]
    experts = Experts(
        router=packed_of(layer.router.packed).struct,
        gate_up=ctypes.addressof(pointers[0]),
        down=ctypes.addressof(pointers[1]),
        first=layer.first_expert,
        held=num_experts,
        top_k=layer.top_k,
    )
    struct.experts = ctypes.addressof(experts)
    return (experts, *pointers)


def _agree(*expected: tuple[str, int, int]) -> None:
    for name, value, expected_value in expected:
        if value != expected_value:
            raise ValueError(f"layer: {name}={value} where the other parts need {expected_value}")


def mask_struct(mask: AttentionMaskSpec) -> library.AttentionMask:
    """The struct of an attention mask."""
    return library.AttentionMask(chunk_size=mask.chunk_size, window=mask.window, sinks=mask.sinks)


def bare_layer_struct(layer: DenseLayer) -> Layer:
    """The struct of a layer's sizes, without weights."""
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
            visible=mask_struct(layer.style.mask),
        ),
    )


def linear_of(packed: Packed) -> Linear:
    """The `Linear` of a packed matrix; the packed form includes the bias."""
    return Linear(
        out_features=packed.struct.out_features,
        in_features=packed.struct.in_features,
        packed=packed,
        bias=None,
        nbytes=packed.nbytes,
    )


def vocab_of(packed: Packed, first_row: int) -> Vocab:
    """The `Vocab` of packed vocabulary rows."""
    return Vocab(
        first_row=first_row,
        num_rows=packed.struct.out_features,
        hidden_size=packed.struct.in_features,
        packed=packed,
        nbytes=packed.nbytes,
    )


def batch_struct(batch: FlatBatch, num_tokens: int, head_dim: int) -> Batch:
    """The struct of a batch; the batch must outlive the call that uses the struct.

    The struct of the batch's adapters lives as long as the struct itself.
    """
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
        if (
            tensor.shape != shape
            or tensor.dtype != dtype
            or (shape[-1] > 1 and tensor.stride(-1) != 1)
        ):
            raise ValueError(
                f"batch.{name}: {str(tensor.dtype)[6:]} {tuple(tensor.shape)} with strides "
                f"{tensor.stride()}; expected {str(dtype)[6:]} {shape} with unit stride"
            )
    adapters = None if batch.adapters is None else rows_struct(batch.adapters, num_tokens)
    struct = Batch(
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
        adapters=None if adapters is None else ctypes.addressof(adapters),
    )
    struct.rows = adapters
    return struct


def draws_struct(
    rows: SamplingRows, num_rows: int, num_columns: int
) -> tuple[Draws, tuple[Tensor, ...]]:
    """The struct of sampling parameters, and the tensors that the struct points to."""
    references: list[Tensor] = []
    for name, dtype in (
        ("temperature_R", torch.float32),
        ("top_k_R", torch.int32),
        ("top_p_R", torch.float32),
        ("min_p_R", torch.float32),
        ("seed_R", torch.int64),
        ("position_R", torch.int64),
    ):
        values_R: Tensor = getattr(rows, name)
        if values_R.shape != (num_rows,):
            raise ValueError(
                f"sample: {name} has shape {tuple(values_R.shape)} for {num_rows} rows of logits"
            )
        references.append(values_R.to("cpu", dtype).contiguous())
    draws = Draws(*(values_R.data_ptr() for values_R in references))
    if rows.token_ids_V is not None:
        if rows.token_ids_V.shape != (num_columns,):
            raise ValueError(
                f"sample: token_ids_V has shape {tuple(rows.token_ids_V.shape)} for {num_columns} "
                "columns of logits"
            )
        references.append(rows.token_ids_V.to("cpu", torch.int32).contiguous())
        draws.token_ids = references[-1].data_ptr()
    if rows.allowed_RW is not None:
        shape = (num_rows, num_mask_words(num_columns))
        if rows.allowed_RW.shape != shape:
            raise ValueError(
                f"sample: allowed_RW has shape {tuple(rows.allowed_RW.shape)}; {num_rows} rows of "
                f"{num_columns} logits need {shape}"
            )
        references.append(rows.allowed_RW.to("cpu", torch.int32).contiguous())
        draws.allowed, draws.allowed_stride = references[-1].data_ptr(), shape[1]
    return draws, tuple(references)

"""The CPU backend: the op list on C++ kernels, a single call for all layers of a stage.

Knows the C function of each op; knows nothing of models. Penalties and bans are the reference's.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from arriero.kernels import input_transform, quantize
from arriero.kernels.attention_mask import FULL_ATTENTION, AttentionMaskSpec
from arriero.kernels.cpu import attention, lora, sampling, weights
from arriero.kernels.cpu.cache import CpuKVCache
from arriero.kernels.cpu.decoder import CpuDecoder
from arriero.kernels.cpu.library import Layer, load
from arriero.kernels.cpu.packed_file import CpuPackedFile
from arriero.kernels.cpu.structs import (
    add_experts,
    batch_struct,
    cache_of,
    can_fuse,
    can_fuse_experts,
    check_cache,
    float_rows,
    float_vector,
    layer_struct,
    linear_of,
    mlp_struct,
    packed_of,
    vocab_of,
)
from arriero.kernels.cpu.threads import available_threads
from arriero.kernels.cpu.weights import pack_plain, pack_quantized
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.halves import HalfSums
from arriero.kernels.input_transform import InputTransform
from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.lora import AdapterRows, LoraBank
from arriero.kernels.ops import Experts, LayerTaps, Ops, Reduce, ReduceNorm
from arriero.kernels.packed_weights import Linear, Vocab
from arriero.kernels.quantized_weight import QuantizedWeight
from arriero.kernels.sampling_rows import Sampled, SamplingRows


class CpuOps(Ops):
    """The op list on the CPU.

    On a CPU with instructions for bf16 pairs, inputs that meet bf16 weights are rounded to bf16 (as
    in the reference); with `exact_inputs` the inputs stay float32, at half the speed. With
    `activation_dtype` int8, inputs that meet int8 and int4 weights are rounded to int8 by
    `input_levels.int8_groups`, where `weights.takes_levels` holds.
    """

    name = "cpu"

    def __init__(
        self,
        device: torch.device,
        threads: int | None = None,
        *,
        exact_inputs: bool = False,
        activation_dtype: str | None = None,
        variant: str | None = None,
    ) -> None:
        """Load the library and start the threads.

        Raises:
            RuntimeError: this machine can use no variant of the library.
            ValueError: the device is not a CPU, `threads` is not positive, or the kernels cannot
                round inputs to `activation_dtype`.
        """
        if device.type != "cpu":
            raise ValueError(f"kernels='cpu' runs on device 'cpu', not {device}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        if activation_dtype not in (None, "int8"):
            raise ValueError(f"activation_dtype={activation_dtype!r} must be int8, or None")
        self.device = device
        self.library = load(variant)
        self.num_threads = available_threads() if threads is None else threads
        # Torch computes little between calls, and its threads would take the cores from these.
        torch.set_num_threads(1)
        self._machine = self.library.machine(self.num_threads, exact_inputs)
        self._levels = activation_dtype == "int8"
        self._folder: Path | None = None

    # Packing.

    def pack_linear(
        self, weights_OI: Sequence[Tensor], bias_O: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """Stack by rows and pack; see `Ops.pack_linear`."""
        return linear_of(
            pack_plain(self.library, self._machine, weights_OI, bias_O, dtype, self._folder)
        )

    def pack_vocab(self, weight_VH: Tensor, first_row: int, dtype: torch.dtype) -> Vocab:
        """Pack rows; `embed` and `logits` read the same panels."""
        packed = pack_plain(self.library, self._machine, [weight_VH], None, dtype)
        return vocab_of(packed, first_row)

    def pack_quantized(self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None) -> Linear:
        """Stack by rows and pack; see `Ops.pack_quantized`."""
        return linear_of(
            pack_quantized(
                self.library, self._machine, weights, bias_O, self._folder, levels=self._levels
            )
        )

    def pack_transformed(
        self, weights: Sequence[QuantizedWeight], bias_O: Tensor | None, inputs: InputTransform
    ) -> Linear:
        """See `Ops.pack_transformed`; inputs that a checkpoint rounds are not rounded again."""
        levels, self._levels = self._levels, self._levels and not inputs.rounds
        try:
            return super().pack_transformed(weights, bias_O, inputs)
        finally:
            self._levels = levels

    def pack_quantized_vocab(self, weight: QuantizedWeight, first_row: int) -> Vocab:
        """Pack rows; see `Ops.pack_quantized_vocab`."""
        if weight.kind == "fp4":
            raise NotImplementedError("kernels='cpu': fp4 tables have no kernel; use plain tables")
        packed = pack_quantized(self.library, self._machine, [weight], None, levels=self._levels)
        return vocab_of(packed, first_row)

    @contextmanager
    def offloading(self, folder: Path) -> Iterator[None]:
        """Weights packed within the context are mapped from a file; see `Ops.offloading`."""
        self._folder = folder
        try:
            yield
        finally:
            self._folder = None

    @cached_property
    def packed_build(self) -> str:
        """See `Ops.packed_build`: the library, and the code that lays out its weights."""
        digest = hashlib.blake2b(self.library.path.read_bytes(), digest_size=16)
        for module in (weights, quantize):
            digest.update(Path(str(module.__file__)).read_bytes())
        return digest.hexdigest()

    def packed_file(self, path: Path) -> CpuPackedFile:
        """See `Ops.packed_file`."""
        return CpuPackedFile(path)

    def kv_cache(self, spec: KVCacheSpec, device: torch.device) -> KVCache:
        """Allocate a paged cache of zeros."""
        if device.type != "cpu":
            raise ValueError(f"kernels='cpu' has its cache on device 'cpu', not {device}")
        return CpuKVCache(self.library, spec)

    # Operations.

    def embed(self, tokens_T: Tensor, vocab: Vocab) -> Tensor:
        """Rows of the table, float32; see `Ops.embed`."""
        tokens_T = tokens_T.to(torch.int32).contiguous()
        out_TH = torch.empty(tokens_T.shape[0], vocab.hidden_size)
        self.call(
            "embed",
            packed_of(vocab.packed).address,
            vocab.first_row,
            tokens_T.data_ptr(),
            tokens_T.shape[0],
            out_TH.data_ptr(),
        )
        return out_TH

    def logits(self, x_RH: Tensor, norm_H: Tensor, eps: float, vocab: Vocab) -> Tensor:
        """Final norm and product in one pass; see `Ops.logits`."""
        x_RH = float_rows("logits", x_RH, vocab.hidden_size)
        norm_H = float_vector("norm_H", norm_H, vocab.hidden_size)
        out_RV = torch.empty(x_RH.shape[0], vocab.num_rows)
        self.call(
            "logits",
            packed_of(vocab.packed).address,
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
        if w.inputs is not None:
            return input_transform.linear(self, x_TI, w)
        x_TI = float_rows("linear", x_TI, w.in_features)
        out_TO = torch.empty(x_TI.shape[0], w.out_features)
        self.call(
            "linear",
            packed_of(w.packed).address,
            x_TI.data_ptr(),
            x_TI.stride(0),
            x_TI.shape[0],
            out_TO.data_ptr(),
        )
        return out_TO

    def add_lora(
        self, y_TO: Tensor, x_TI: Tensor, banks: Sequence[LoraBank], rows: AdapterRows
    ) -> None:
        """See `Ops.add_lora`."""
        lora.add(self, y_TO, x_TI, banks, rows)

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        x_TH = float_rows("rms_norm", x_TH, weight_H.shape[0])
        weight_H = float_vector("weight_H", weight_H, weight_H.shape[0])
        out_TH = torch.empty(x_TH.shape)
        self.call(
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
        gate_up_TF2 = float_rows("silu_mul", gate_up_TF2, gate_up_TF2.shape[1])
        size = gate_up_TF2.shape[1] // 2
        out_TF = torch.empty(gate_up_TF2.shape[0], size)
        self.call(
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
        return attention.rope_write_kv(self, qkv_TE, layer, kv, kv_layer, batch)

    def paged_attention(
        self,
        q_TND: Tensor,
        scale: float,
        kv: KVCache,
        kv_layer: int,
        batch: FlatBatch,
        mask: AttentionMaskSpec = FULL_ATTENTION,
    ) -> Tensor:
        """See `Ops.paged_attention`."""
        return attention.paged_attention(self, q_TND, scale, kv, kv_layer, batch, mask)

    def grouped_linear(self, x_XI: Tensor, experts: Sequence[Linear], starts_E1: Tensor) -> Tensor:
        """See `Ops.grouped_linear`; all experts have the same shape and type."""
        if experts[0].inputs is not None:
            return input_transform.grouped_linear(self, x_XI, experts, starts_E1)
        packed = [packed_of(expert.packed) for expert in experts]
        structs = [matrix.struct for matrix in packed]
        shapes = {(s.out_features, s.in_features, s.type, s.group) for s in structs}
        if len(shapes) != 1 or starts_E1.shape != (len(structs) + 1,):
            raise ValueError(
                f"grouped_linear: {len(structs)} experts of {len(shapes)} shapes or types with "
                f"{starts_E1.shape[0]} starts; give experts of the same shape and type, and "
                f"{len(structs) + 1} starts"
            )
        x_XI = float_rows("grouped_linear", x_XI, experts[0].in_features)
        starts_E1 = starts_E1.to(torch.int32).contiguous()
        if int(starts_E1[-1]) != x_XI.shape[0]:
            raise ValueError(
                f"grouped_linear: starts end at {int(starts_E1[-1])} for {x_XI.shape[0]} rows"
            )
        # Start to read all needed experts from disk while the first expert is computed. Nothing
        # releases them: busy experts stay in the system's page cache, idle experts leave it.
        for matrix, rows in zip(packed, starts_E1.diff().tolist(), strict=True):
            if matrix.mapping is not None and rows:
                matrix.mapping.prefetch()
        pointers = (ctypes.c_void_p * len(structs))(*(ctypes.addressof(s) for s in structs))
        out_XO = torch.empty(x_XI.shape[0], experts[0].out_features)
        self.call(
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
        """See `Ops.sample`. Biases and penalties are those of the reference."""
        return sampling.sample(self, logits_RV, rows)

    # Blocks.

    def attention_block(
        self, x_TH: Tensor, layer: DenseLayer, kv: KVCache, kv_layer: int, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.attention_block`."""
        check_cache(layer, kv)
        if not can_fuse(layer):
            return super().attention_block(x_TH, layer, kv, kv_layer, batch)
        struct, _references = layer_struct(layer)
        struct.index = kv_layer
        return self.run_attention(struct, layer, x_TH, cache_of(kv), batch)

    def mlp_block(
        self, x_TH: Tensor, layer: DenseLayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """See `Ops.mlp_block`."""
        if not can_fuse(layer):
            return super().mlp_block(x_TH, layer, adapters)
        struct, _references = mlp_struct(layer)
        return self.run_mlp(struct, layer, x_TH, adapters)

    def moe_block(
        self, x_TH: Tensor, layer: MoELayer, adapters: AdapterRows | None = None
    ) -> Tensor:
        """See `Ops.moe_block`."""
        if not can_fuse_experts(layer) or adapters is not None:
            return super().moe_block(x_TH, layer, adapters)
        struct, _references = mlp_struct(layer)
        _expert_references = add_experts(struct, layer)
        return self.run_mlp(struct, layer, x_TH)

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
        """See `Ops.decoder`.

        A C++ call for each step, and one more for each tap; with `reduce` or experts on other
        ranks, a call for each block.
        """
        return CpuDecoder(self, layers, kv, reduce, local_kv, experts, taps or {})

    def run_attention(
        self,
        struct: Layer,
        layer: DenseLayer,
        x_TH: Tensor,
        cache: CpuKVCache,
        batch: FlatBatch,
    ) -> Tensor:
        """`attention_block` with a struct of the layer, `index` included."""
        x_TH = float_rows("attention_block", x_TH, layer.qkv.in_features).contiguous()
        part_TH = torch.empty(x_TH.shape[0], layer.o.out_features)
        c_batch = batch_struct(batch, x_TH.shape[0], layer.head_dim)
        self.call(
            "attention_block",
            ctypes.addressof(struct),
            cache.address,
            ctypes.addressof(c_batch),
            x_TH.data_ptr(),
            part_TH.data_ptr(),
        )
        return part_TH

    def run_mlp(
        self, struct: Layer, layer: DenseLayer, x_TH: Tensor, adapters: AdapterRows | None = None
    ) -> Tensor:
        """`mlp_block`, or `moe_block` without adapters, with a struct of the layer."""
        rows = None if adapters is None else lora.rows_struct(adapters, x_TH.shape[0])
        x_TH = float_rows("mlp_block", x_TH, layer.gate_up.in_features).contiguous()
        part_TH = torch.empty(x_TH.shape[0], layer.down.out_features)
        self.call(
            "mlp_block",
            ctypes.addressof(struct),
            x_TH.shape[0],
            x_TH.data_ptr(),
            part_TH.data_ptr(),
            None if rows is None else ctypes.addressof(rows),
        )
        return part_TH

    def call(self, name: str, *arguments: object) -> None:
        """Call `arriero_<name>` on this backend's threads."""
        self.library.call(name, self._machine.handle, *arguments)

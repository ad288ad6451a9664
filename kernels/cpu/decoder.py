"""The pass through a stage's layers: a C++ call for each step, or for each block.

Knows the order of blocks; knows nothing of the inside of blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from arriero.kernels.cpu.library import Layer
from arriero.kernels.cpu.structs import (
    References,
    add_experts,
    batch_struct,
    cache_of,
    can_fuse,
    can_fuse_experts,
    check_cache,
    float_rows,
    layer_struct,
    mappings_of,
)
from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layer_cache import layer_caches
from arriero.kernels.layers import DenseLayer, MoELayer
from arriero.kernels.ops import Experts, LayerTaps, Reduce

if TYPE_CHECKING:
    from arriero.kernels.cpu.backend import CpuOps


class CpuDecoder:
    """The pass through a stage's layers; collects all pointers once."""

    def __init__(
        self,
        ops: CpuOps,
        layers: Sequence[DenseLayer],
        kv: KVCache | None,
        reduce: Reduce | None,
        local_kv: KVCache | None,
        experts: Experts | None,
        taps: LayerTaps,
    ) -> None:
        """Check that the layers fit the caches.

        Raises:
            ValueError: a layer does not fit its cache.
        """
        self._ops = ops
        self._layers = tuple(layers)
        self._caches = layer_caches(layers, kv, local_kv)
        for layer, cache in zip(layers, self._caches, strict=True):
            check_cache(layer, cache.kv)
            if cache.index >= cache.kv.spec.num_layers:
                raise ValueError(
                    f"{len(layers)} layers do not fit a cache of {cache.kv.spec.num_layers} layers"
                )
        self._reduce = reduce
        self._experts, self._taps = experts, dict(taps)
        cuts = sorted({0, len(layers), *self._taps})
        self._runs = [(start, stop) for start, stop in pairwise(cuts) if stop > start]
        self._structs = (Layer * len(self._layers))()
        self._references: list[References] = []
        for i, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            if can_fuse(layer):
                self._structs[i], references = layer_struct(layer)
                self._structs[i].local, self._structs[i].index = cache.local, cache.index
                self._references.append(references)
            if self._routes_here(layer):
                self._references.append(add_experts(self._structs[i], layer))
        all_fused = all(
            can_fuse(layer) and (self._routes_here(layer) or not isinstance(layer, MoELayer))
            for layer in self._layers
        )
        self._mappings = [mappings_of(layer) for layer in self._layers]
        self._in_one_call = reduce is None and all_fused and not any(self._mappings)
        self._any_experts = any(isinstance(layer, MoELayer) for layer in self._layers)
        addresses = {cache.local: cache_of(cache.kv).address for cache in self._caches}
        self._kv, self._local_kv = addresses.get(False), addresses.get(True)

    def _routes_here(self, layer: DenseLayer) -> TypeGuard[MoELayer]:
        """Whether C++ runs the experts of the layer."""
        is_whole = isinstance(layer, MoELayer) and can_fuse(layer) and can_fuse_experts(layer)
        return is_whole and self._experts is None

    def __call__(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        """Run the layers over x [T, H]; changes contiguous float32 rows in place."""
        if not self._layers:
            return x_TH
        x_TH = float_rows("decoder", x_TH, self._layers[0].qkv.in_features).contiguous()
        in_blocks = batch.adapters is not None and self._any_experts
        if in_blocks or not self._in_one_call:
            return self._run_blocks(x_TH, batch)
        num_tokens, head_dim = x_TH.shape[0], self._layers[0].head_dim
        c_batch = batch_struct(batch, num_tokens, head_dim)
        c_local_batch = None
        if self._local_kv is not None:
            assert batch.local is not None, "layers with a local cache need a local block table"
            c_local_batch = batch_struct(batch.local, num_tokens, head_dim)
        for start, stop in self._runs:
            self._tap(start, x_TH)
            self._ops.call(
                "decoder",
                ctypes.addressof(self._structs) + start * ctypes.sizeof(Layer),
                stop - start,
                self._kv,
                ctypes.addressof(c_batch),
                x_TH.data_ptr(),
                self._local_kv,
                None if c_local_batch is None else ctypes.addressof(c_local_batch),
            )
        self._tap(len(self._layers), x_TH)
        return x_TH

    def _tap(self, i: int, x_TH: Tensor) -> None:
        """Show x to the tap before layer i, if there is one."""
        tap = self._taps.get(i)
        if tap is not None:
            tap(x_TH)

    def _run_blocks(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        ops, reduce, adapters = self._ops, self._reduce, batch.adapters
        self._read_ahead(0)
        for i, (layer, cache) in enumerate(zip(self._layers, self._caches, strict=True)):
            self._read_ahead(i + 1)
            self._tap(i, x_TH)
            struct, layer_batch = self._structs[i], cache.batch(batch)
            if can_fuse(layer):
                part = ops.run_attention(struct, layer, x_TH, cache_of(cache.kv), layer_batch)
            else:
                part = ops.attention_block(x_TH, layer, cache.kv, cache.index, layer_batch)
            x_TH += part if reduce is None else reduce(part)
            if isinstance(layer, MoELayer) and self._experts is not None:
                part = self._experts(x_TH, layer, adapters)
            elif isinstance(layer, MoELayer) and (adapters or not self._routes_here(layer)):
                part = ops.moe_block(x_TH, layer, adapters)
            elif isinstance(layer, MoELayer):
                part = ops.run_mlp(struct, layer, x_TH)
            elif not can_fuse(layer):
                part = ops.mlp_block(x_TH, layer, adapters)
            else:
                part = ops.run_mlp(struct, layer, x_TH, adapters)
            x_TH += part if reduce is None else reduce(part)
            for mapping in self._mappings[i]:
                mapping.release()
        self._tap(len(self._layers), x_TH)
        return x_TH

    def _read_ahead(self, i: int) -> None:
        """Start to read the weights of layer i that are on disk."""
        for mapping in self._mappings[i] if i < len(self._mappings) else ():
            mapping.prefetch()

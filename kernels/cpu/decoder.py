"""The pass through a stage's layers: one call into C++ a step, or one a block.

Knows the order of blocks; refuses to know what is in them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from arriero.kernels.cpu.library import Layer
from arriero.kernels.cpu.structs import (
    Kept,
    add_experts,
    batch_struct,
    cache_of,
    check_cache,
    float_rows,
    fuses,
    fuses_experts,
    layer_struct,
    rooms_of,
)
from arriero.kernels.ops import (
    DenseLayer,
    Experts,
    FlatBatch,
    KVCache,
    MoELayer,
    Reduce,
    layer_caches,
)

if TYPE_CHECKING:
    from arriero.kernels.cpu.backend import CpuOps


class CpuDecoder:
    """The pass through a stage's layers, its pointers collected once."""

    def __init__(
        self,
        ops: CpuOps,
        layers: Sequence[DenseLayer],
        kv: KVCache | None,
        reduce: Reduce | None,
        local_kv: KVCache | None,
        experts: Experts | None,
    ) -> None:
        """Check that the layers fit the caches and each other.

        Raises:
            ValueError: they do not.
        """
        self._ops = ops
        self._layers = tuple(layers)
        self._places = layer_caches(layers, kv, local_kv)
        for layer, place in zip(layers, self._places, strict=True):
            check_cache(layer, place.kv)
            if place.index >= place.kv.spec.num_layers:
                raise ValueError(
                    f"{len(layers)} layers do not fit a cache of {place.kv.spec.num_layers} layers"
                )
        self._reduce = reduce
        self._experts = experts
        self._structs = (Layer * len(self._layers))()
        self._kept: list[Kept] = []
        for i, (layer, place) in enumerate(zip(self._layers, self._places, strict=True)):
            if fuses(layer):
                self._structs[i], kept = layer_struct(layer)
                self._structs[i].local, self._structs[i].index = place.local, place.index
                self._kept.append(kept)
            if self._routes_here(layer):
                self._kept.append(add_experts(self._structs[i], layer))
        whole = all(
            fuses(layer) and (self._routes_here(layer) or not isinstance(layer, MoELayer))
            for layer in self._layers
        )
        self._rooms = [rooms_of(layer) for layer in self._layers]
        self._in_one_call = reduce is None and whole and not any(self._rooms)
        addresses = {place.local: cache_of(place.kv).address for place in self._places}
        self._kv, self._local_kv = addresses.get(False), addresses.get(True)

    def _routes_here(self, layer: DenseLayer) -> TypeGuard[MoELayer]:
        """Whether C++ runs the layer's experts."""
        is_whole = isinstance(layer, MoELayer) and fuses(layer) and fuses_experts(layer)
        return is_whole and self._experts is None

    def __call__(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        """Run the layers over x [T, H]; float32 rows without gaps are changed in place."""
        if not self._layers:
            return x_TH
        x_TH = float_rows("decoder", x_TH, self._layers[0].qkv.in_features).contiguous()
        if not self._in_one_call:
            return self._run_blocks(x_TH, batch)
        num_tokens, head_dim = x_TH.shape[0], self._layers[0].head_dim
        of_batch = batch_struct(batch, num_tokens, head_dim)
        of_local = None
        if self._local_kv is not None:
            assert batch.local is not None, "layers with a cache of their own need their own table"
            of_local = batch_struct(batch.local, num_tokens, head_dim)
        self._ops.call(
            "decoder",
            ctypes.addressof(self._structs),
            len(self._layers),
            self._kv,
            ctypes.addressof(of_batch),
            x_TH.data_ptr(),
            self._local_kv,
            None if of_local is None else ctypes.addressof(of_local),
        )
        return x_TH

    def _run_blocks(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        ops, reduce = self._ops, self._reduce
        self._read_ahead(0)
        for i, (layer, place) in enumerate(zip(self._layers, self._places, strict=True)):
            self._read_ahead(i + 1)
            struct, seen = self._structs[i], place.batch(batch)
            if fuses(layer):
                part = ops.run_attention(struct, layer, x_TH, cache_of(place.kv), seen)
            else:
                part = ops.attention_block(x_TH, layer, place.kv, place.index, seen)
            x_TH += part if reduce is None else reduce(part)
            if isinstance(layer, MoELayer) and self._experts is not None:
                part = self._experts(x_TH, layer)
            elif isinstance(layer, MoELayer) and not self._routes_here(layer):
                part = ops.moe_block(x_TH, layer)
            elif not fuses(layer):
                part = ops.mlp_block(x_TH, layer)
            else:
                part = ops.run_mlp(struct, layer, x_TH)
            x_TH += part if reduce is None else reduce(part)
            for room in self._rooms[i]:
                room.behind()
        return x_TH

    def _read_ahead(self, i: int) -> None:
        """Begin to read a layer's weights, where they are on disk."""
        for room in self._rooms[i] if i < len(self._rooms) else ():
            room.ahead()

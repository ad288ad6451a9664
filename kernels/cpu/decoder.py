"""The pass through a stage's layers: one call into C++ a step, or one a block.

Knows the order of blocks; refuses to know what is in them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from arriero.kernels.cpu.library import Layer
from arriero.kernels.cpu.structs import (
    batch_struct,
    cache_of,
    check_cache,
    float_rows,
    fuses,
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
        self._caches = [cache_of(place.kv) for place in self._places]
        self._reduce = reduce
        self._routed = ops.moe_block if experts is None else experts
        self._structs = (Layer * len(self._layers))()
        self._kept: list[tuple[Tensor, ...]] = []  # what the structs point into
        for i, layer in enumerate(self._layers):
            if fuses(layer):
                self._structs[i], tensors = layer_struct(layer)
                self._kept.append(tensors)
        whole = all(fuses(layer) and not isinstance(layer, MoELayer) for layer in self._layers)
        self._rooms = [rooms_of(layer) for layer in self._layers]
        self._in_one_call = reduce is None and whole and local_kv is None and not any(self._rooms)

    def __call__(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        """Run the layers over x [T, H]; float32 rows without gaps are changed in place."""
        if not self._layers:
            return x_TH
        x_TH = float_rows("decoder", x_TH, self._layers[0].qkv.in_features).contiguous()
        if not self._in_one_call:
            return self._run_blocks(x_TH, batch)
        of_batch = batch_struct(batch, x_TH.shape[0], self._layers[0].head_dim)
        self._ops.call(
            "decoder",
            ctypes.addressof(self._structs),
            len(self._layers),
            self._caches[0].address,
            ctypes.addressof(of_batch),
            x_TH.data_ptr(),
        )
        return x_TH

    def _run_blocks(self, x_TH: Tensor, batch: FlatBatch) -> Tensor:
        ops, reduce = self._ops, self._reduce
        self._read_ahead(0)
        for i, (layer, place) in enumerate(zip(self._layers, self._places, strict=True)):
            self._read_ahead(i + 1)
            cache, at, seen = self._caches[i], place.index, place.batch(batch)
            if fuses(layer):
                part = ops.run_attention(self._structs[i], layer, x_TH, cache, at, seen)
            else:
                part = ops.attention_block(x_TH, layer, cache, at, seen)
            x_TH += part if reduce is None else reduce(part)
            if isinstance(layer, MoELayer):
                part = self._routed(x_TH, layer)
            elif not fuses(layer):
                part = ops.mlp_block(x_TH, layer)
            else:
                part = ops.run_mlp(self._structs[i], layer, x_TH)
            x_TH += part if reduce is None else reduce(part)
            for room in self._rooms[i]:
                room.behind()
        return x_TH

    def _read_ahead(self, i: int) -> None:
        """Begin to read a layer's weights, where they are on disk."""
        for room in self._rooms[i] if i < len(self._rooms) else ():
            room.ahead()

"""Which cache, and which place in the cache, each layer of a stage uses.

Knows layers, caches and batches; knows nothing of how a backend reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.kv_cache import KVCache
from arriero.kernels.layers import DenseLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """The cache for the keys and values of a layer.

    Attributes:
        kv: the cache.
        index: index of the layer within the cache.
        local: the cache is for layers with chunked attention, as `FlatBatch.local` describes.
    """

    kv: KVCache
    index: int
    local: bool

    def batch(self, batch: FlatBatch) -> FlatBatch:
        """The batch for this layer: `FlatBatch.local` for a local cache."""
        if not self.local:
            return batch
        assert batch.local is not None, "layers with a local cache need a local block table"
        return batch.local


def layer_caches(
    layers: Sequence[DenseLayer], kv: KVCache | None, local_kv: KVCache | None
) -> list[LayerCache]:
    """The cache of each layer: `local_kv`, where given, for layers with chunked attention."""
    caches: list[LayerCache] = []
    counts = {True: 0, False: 0}
    for layer in layers:
        local = local_kv is not None and layer.style.mask.chunk_size > 0
        cache = local_kv if local else kv
        assert cache is not None, "a stage has a cache for each kind of its layers"
        caches.append(LayerCache(kv=cache, index=counts[local], local=local))
        counts[local] += 1
    return caches

"""The paged cache of the Triton backend.

Knows blocks and slots; knows nothing of sequences. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels.kv_cache import KVCache, KVCacheSpec


class TritonKVCache(KVCache):
    """A single tensor [layers, blocks, 2 (k, v), K, P, D], and for int8 the scales without D.

    The keys of a head in a block are contiguous, and so are the values; a block has the canonical
    layout, so that reads and writes of blocks are plain copies.

    Attributes:
        data: the tensor, in the cache's dtype.
        scales: float32 [layers, blocks, 2, K, P] for int8, else None.
    """

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self.spec = spec
        shape = (spec.num_layers, spec.num_blocks, 2, spec.num_kv_heads, spec.block_size)
        self.data = torch.zeros(*shape, spec.head_dim, dtype=spec.dtype, device=device)
        self.scales = torch.zeros(*shape, device=device) if spec.dtype == torch.int8 else None

    @property
    def nbytes(self) -> int:
        """Exact number of allocated bytes."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def read(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """Copy blocks out in the canonical layout; see `KVCache.read`."""
        index = self._index(blocks)
        # As bytes, since not every device gathers every eight-bit float type.
        data = _bytes(self.data[layer])[index].view(self.data.dtype)
        if self.scales is None:
            return data
        return torch.cat([data, self.scales[layer, index][..., None].view(torch.int8)], dim=-1)

    def write(self, layer: int, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in from the canonical layout; see `KVCache.write`."""
        index = self._index(blocks)
        data = data.to(self.data.device, non_blocking=True)
        head_dim = self.spec.head_dim
        values = data[..., :head_dim].to(self.data.dtype).contiguous()
        _bytes(self.data[layer])[index] = _bytes(values)
        if self.scales is not None:
            scales = data[..., head_dim:].contiguous().view(torch.float32)
            self.scales[layer, index] = scales[..., 0]

    def _index(self, blocks: Sequence[int]) -> Tensor:
        index = torch.tensor(list(blocks), dtype=torch.long)
        if self.data.is_cuda:  # the host need not wait for a copy from pinned memory
            index = index.pin_memory()
        return index.to(self.data.device, non_blocking=True)


def _bytes(data: Tensor) -> Tensor:
    return data.view(torch.uint8) if data.dtype.itemsize == 1 else data

"""The paged cache of the CPU backend.

Knows the sizes of the inner layout (native/attention.h); knows nothing of the owners of blocks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels.cpu.library import Cache, Library
from arriero.kernels.cpu.weights import FP8, INT8, TYPES, large_zeros
from arriero.kernels.kv_cache import KVCache, KVCacheSpec

_LANES = 16
_KV_TYPES = TYPES | {torch.int8: INT8, torch.float8_e4m3fn: FP8}
_MAX_HEAD_DIM = 1024


class CpuKVCache(KVCache):
    """Blocks of keys and values, for each head in the order of reads by the kernels."""

    def __init__(self, library: Library, spec: KVCacheSpec) -> None:
        """Allocate zeros.

        Raises:
            ValueError: the kernels do not support the dtype or the shape.
        """
        if spec.dtype not in _KV_TYPES:
            known = ", ".join(str(dtype)[6:] for dtype in _KV_TYPES)
            raise ValueError(f"KV dtype={str(spec.dtype)[6:]} has no CPU kernels; use {known}")
        if spec.head_dim % 2:
            raise ValueError(f"head_dim={spec.head_dim} is odd; RoPE by halves needs an even one")
        if spec.head_dim > _MAX_HEAD_DIM:
            raise ValueError(f"head_dim={spec.head_dim} exceeds {_MAX_HEAD_DIM}")
        sizes = ("num_layers", "num_blocks", "num_kv_heads", "head_dim", "block_size")
        for name in sizes:
            if not 1 <= getattr(spec, name) < 1 << 31:
                raise ValueError(f"{name}={getattr(spec, name)} must be at least 1")
        self.spec = spec
        self._library = library
        groups = -(-spec.block_size // _LANES)
        pair_bytes = 2 * _LANES * spec.dtype.itemsize
        key_bytes = spec.head_dim // 2 * pair_bytes
        value_bytes = -(-spec.head_dim // _LANES) * _LANES // 2 * pair_bytes
        scale_bytes = 2 * _LANES * 4 if spec.dtype == torch.int8 else 0
        head_bytes = groups * (key_bytes + value_bytes + scale_bytes)
        block_bytes = head_bytes * spec.num_kv_heads
        layer_bytes = block_bytes * spec.num_blocks
        self._data = large_zeros(layer_bytes * spec.num_layers)
        self.struct = Cache(
            data=self._data.data_ptr(),
            layer_bytes=layer_bytes,
            block_bytes=block_bytes,
            head_bytes=head_bytes,
            type=_KV_TYPES[spec.dtype],
            block_size=spec.block_size,
            num_blocks=spec.num_blocks,
            num_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_layers=spec.num_layers,
        )
        self.address = ctypes.addressof(self.struct)

    @property
    def nbytes(self) -> int:
        """Exact number of allocated bytes."""
        return self._data.nbytes

    def read(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """Copy blocks out in the canonical layout; see `KVCache.read`."""
        out = torch.empty(self._canonical_shape(len(blocks)), dtype=self.spec.dtype)
        self._copy(layer, blocks, out, store=False)
        return out

    def write(self, layer: int, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in from the canonical layout; see `KVCache.write`."""
        shape = self._canonical_shape(len(blocks))
        if data.shape != shape:
            raise ValueError(f"data has shape {tuple(data.shape)}; the blocks need {shape}")
        self._copy(layer, blocks, data.to("cpu", self.spec.dtype).contiguous(), store=True)

    def _canonical_shape(self, num_blocks: int) -> tuple[int, ...]:
        spec = self.spec
        return (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.canonical_dim)

    def _copy(self, layer: int, blocks: Sequence[int], data: Tensor, *, store: bool) -> None:
        ids = (ctypes.c_int64 * len(blocks))(*blocks)
        self._library.call(
            "cache_copy", self.address, layer, ids, len(blocks), data.data_ptr(), int(store)
        )

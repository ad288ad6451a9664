"""The contract of a paged KV cache: its shape, and its canonical layout outside the backend.

Knows blocks; knows nothing of the owners of blocks. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""Dtypes of a KV cache that plain weights do not have, by their names in settings."""


def cache_dtype(name: str) -> torch.dtype:
    """Dtype of a KV cache by its name in settings: "int8", "fp8", or a name of torch."""
    dtype: torch.dtype = SMALL_DTYPES.get(name) or getattr(torch, name)
    return dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheSpec:
    """Shape of the paged cache of a slice's layers.

    With dtype int8, the key and the value of each head and token have levels -127 .. 127 and a
    float32 scale, the greatest magnitude / 127; levels are rounded half to even, and a head of
    zeros has scale 0.

    With dtype float8_e4m3fn, numbers beyond the greatest, 448, are stored as 448.
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

        The four bytes after an int8 vector are the float32 scale, little-endian.
        """
        return self.head_dim + 4 if self.dtype == torch.int8 else self.head_dim


class KVCache(ABC):
    """The paged cache of a slice's layers. The backend decides the inner layout."""

    spec: KVCacheSpec

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Exact number of allocated bytes."""

    @abstractmethod
    def read(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """Copy blocks out in the canonical layout [len(blocks), 2 (k, v), K, P, D].

        In the cache's dtype; see `KVCacheSpec.canonical_dim` for int8.
        """

    @abstractmethod
    def write(self, layer: int, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in from the canonical layout; int8 for an int8 cache, else any float."""

"""The paged cache of the reference backend.

Knows blocks and slots; knows nothing of their owners. Shape legend: kernels/ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.kv_cache import KVCache, KVCacheSpec
from arriero.kernels.quantized_weight import FP8_MAX


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPU a page takes memory only when written, while torch would write all pages."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(dtype).view(shape)


def int8_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Levels, float32 [..., D], and scales [...] of x [..., D]; see `KVCacheSpec`."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    return (x / scale.where(scale > 0, 1.0)[..., None]).round_().clamp_(-127, 127), scale


class ReferenceKVCache(KVCache):
    """A single tensor [layers, 2 (k, v), blocks, K, P, D], and for int8 the scales without D."""

    def __init__(self, spec: KVCacheSpec, device: torch.device) -> None:
        self.spec = spec
        shape = (spec.num_layers, 2, spec.num_blocks, spec.num_kv_heads, spec.block_size)
        self._data = _zeros((*shape, spec.head_dim), spec.dtype, device)
        self._scales = torch.zeros(*shape, device=device) if spec.dtype == torch.int8 else None

    @property
    def nbytes(self) -> int:
        """Exact number of allocated bytes."""
        return self._data.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def read(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """Copy blocks out in the canonical layout; see `KVCache.read`."""
        index = torch.tensor(blocks, dtype=torch.long, device=self._data.device)
        data = self._data[layer][:, index]
        if self._scales is not None:
            scales = self._scales[layer][:, index, :, :, None].contiguous()
            data = torch.cat([data, scales.view(torch.int8)], dim=-1)
        return data.transpose(0, 1).contiguous()

    def write(self, layer: int, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks in from the canonical layout; see `KVCache.write`."""
        index = torch.tensor(blocks, dtype=torch.long, device=self._data.device)
        data = data.to(self._data.device).transpose(0, 1)
        head_dim = self.spec.head_dim
        self._data[layer][:, index] = data[..., :head_dim].to(self._data.dtype)
        if self._scales is not None:
            scales = data[..., head_dim:].contiguous().view(torch.float32)
            self._scales[layer][:, index] = scales[..., 0]

    def store(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor) -> None:
        """Write the key and value of each token to the token's slot."""
        size = self.spec.block_size
        block_T, offset_T = slots_T.long() // size, slots_T.long() % size
        for part, x_TKD in enumerate((k_TKD, v_TKD)):
            if self._scales is not None:
                x_TKD, scale_TK = int8_levels(x_TKD)
                self._scales[layer, part][block_T, :, offset_T] = scale_TK
            elif self._data.dtype == torch.float8_e4m3fn:
                x_TKD = x_TKD.clamp(-FP8_MAX, FP8_MAX)
            self._data[layer, part][block_T, :, offset_T] = x_TKD.to(self._data.dtype)

    def gather(self, layer: int, blocks_SB: Tensor) -> Tensor:
        """Keys and values of the blocks, float32 [2, S, B, K, P, D]."""
        data = self._data[layer][:, blocks_SB].float()
        if self._scales is not None:
            data *= self._scales[layer][:, blocks_SB][..., None]
        return data

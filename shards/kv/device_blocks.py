"""Blocks of a rank's cache as tiers store them; on a GPU by way of pinned memory.

All layers of a transfer are queued, and the host waits once at its end. A copy from or to pageable
memory would wait in each layer, at a fraction of the link's rate. Knows the cache and the form of
blocks; knows nothing of tiers and keys.

Shape legend: N blocks, L layers, K KV heads, P positions of a block, D head dimension (canonical).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arriero.kernels.kv_cache import KVCache
from arriero.shards.config.kv_tiers import RowType
from arriero.shards.kv.block_shards import BlockForm, BlockShard
from arriero.shards.kv.files import empty
from arriero.shards.kv.packed_rows import pack, unpack


class DeviceBlocks:
    """Reads and writes blocks of a cache; for one thread.

    Args:
        kv: the cache.
        form: form of a block in the tiers.
        shard: layers and heads of the rank.
        row_type: type of packed rows; None for the cache's own numbers.
        most: most blocks of a transfer.
    """

    def __init__(
        self,
        kv: KVCache,
        form: BlockForm,
        shard: BlockShard,
        row_type: RowType | None,
        most: int,
    ) -> None:
        self._kv: KVCache | None = kv
        self._form, self._shard, self._row_type = form, shard, row_type
        self._most = most
        self._layers = range(shard.layers[1] - shard.layers[0])
        self._device = kv.read(0, [0]).device
        self._staging: Tensor | None = None

    def rebind(self, kv: KVCache | None) -> None:
        """Use another cache of the same form from now on; None: no copy follows until then."""
        self._kv = kv

    @property
    def _bound(self) -> KVCache:
        assert self._kv is not None, "the leader copies no block without a cache"
        return self._kv

    @property
    def on_cuda(self) -> bool:
        """Whether the cache is in a GPU's memory."""
        return self._device.type == "cuda"

    def read(self, blocks: Sequence[int]) -> Tensor:
        """Copy blocks to host memory, [N, L, 2, K, P, D]."""
        data = empty(self._form, self._shard, len(blocks))
        for layer in self._layers:
            rows = self._bound.read(layer, blocks)
            if self._row_type is not None:
                rows = pack(rows, self._row_type)
            self._host_rows(data, layer).copy_(rows, non_blocking=self.on_cuda)
        if self.on_cuda:
            torch.cuda.current_stream(self._device).synchronize()
            data.copy_(self._staged(len(blocks)).transpose(0, 1))
        return data

    def write(self, blocks: Sequence[int], data: Tensor) -> None:
        """Copy blocks [N, L, 2, K, P, D] from host memory."""
        if self.on_cuda:
            self._staged(len(blocks)).copy_(data.transpose(0, 1))
        for layer in self._layers:
            rows = self._host_rows(data, layer)
            if self.on_cuda:
                rows = rows.to(self._device, non_blocking=True)
            if self._row_type is not None:
                rows = unpack(rows, self._row_type)
            self._bound.write(layer, blocks, rows)
        if self.on_cuda:
            torch.cuda.current_stream(self._device).synchronize()

    def _host_rows(self, data: Tensor, layer: int) -> Tensor:
        """A layer of all blocks on the host: in the pinned memory, or in `data` on a CPU."""
        return self._staged(len(data))[layer] if self.on_cuda else data[:, layer]

    def _staged(self, count: int) -> Tensor:
        """Pinned memory for `count` blocks, [L, N, 2, K, P, D]; each layer is contiguous."""
        assert count <= self._most, f"{count} blocks exceed a transfer's {self._most}"
        if self._staging is None:
            layers, *rest = self._form.shape(self._shard)
            shape = (layers, self._most, *rest)
            self._staging = torch.empty(shape, dtype=self._form.dtype, pin_memory=True)
        return self._staging[:, :count]

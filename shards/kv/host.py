"""Blocks in host memory: one rank's slots, readable by processes of the same node.

The memory is an anonymous file (memfd) that lives until the last process with the file ends,
however that process ends. Behind the blocks there is a stamp for each slot: the key of the complete
block in the slot, the number of writes to the slot, and the block's checksums. A reader (see
`peer`) reads the stamp before and after copying, so no lock and no message to the owner is needed.
A slot that received another block meanwhile is a miss, also if the first block is back by then; so
is a slot with a flipped bit.

Knows slots and bytes; the leader knows which block is in which slot.

Shape legend: L layers, K KV heads, P positions of a block, D head dimension (canonical).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import uuid
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.checksums import block_sums
from arriero.shards.kv.host_id import host_name
from arriero.shards.kv.transfers import KEY_BYTES, Segment

Stamps = npt.NDArray[np.void]


class HostPool:
    """Block slots of one rank in host memory.

    Attributes:
        data: [slots, L, 2, K, P, D].
    """

    def __init__(self, form: BlockForm, shard: BlockShard, slots: int, *, pinned: bool) -> None:
        """Reserve the memory; a page is allocated at the first write to its slot.

        Args:
            form: format of the blocks.
            shard: this rank's shard of each block.
            slots: number of blocks.
            pinned: lock the pages and register with CUDA, so that copies run beside the device.
        """
        self._form, self._shard, self._slots = form, shard, slots
        self._name = f"arriero-kv-{uuid.uuid4().hex}"
        self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, memory_bytes(form, shard, slots))
            self._map = mmap.mmap(self._fd, 0)
        except BaseException:
            os.close(self._fd)
            raise
        self.data, self._stamps = views(self._map, form, shard, slots)
        self._pinned = False
        if pinned:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = cudart.cudaHostRegister(self.data.data_ptr(), self.data.nbytes, 0)
            self._pinned = int(status) == 0

    @property
    def memory(self) -> tuple[int, int]:
        """Address and length in bytes of blocks and stamps."""
        return self.data.data_ptr(), memory_bytes(self._form, self._shard, self._slots)

    @property
    def segment(self) -> Segment:
        """Description of the memory for readers on this node."""
        return Segment(
            pid=os.getpid(),
            fd=self._fd,
            name=self._name,
            host=host_name(),
            layers=self._shard.layers,
            heads=self._shard.heads,
            block=(self._form.positions, self._form.dim, self._form.dtype.itemsize),
            slots=self._slots,
        )

    def put(self, slots: Sequence[int], keys: Sequence[bytes], data: Tensor) -> None:
        """Write blocks [N, L, 2, K, P, D] into slots."""
        rows, stamps = list(slots), self._stamps
        stamps["key"][rows] = 0
        stamps["times"][rows] += 1
        stamps["sums"][rows] = block_sums(data).numpy()
        self.data[rows] = data
        for slot, key in zip(rows, keys, strict=True):
            stamps["key"][slot] = np.frombuffer(key, dtype=np.uint8)

    def get(self, key: bytes, slot: int, into: Tensor) -> None:
        """Copy a block, `into` [L, 2, K, P, D].

        Raises:
            BadBlock: the slot has another block, or its bytes have changed.
        """
        if self.stamp(key, slot) is None:
            raise BadBlock("the slot has another block")
        into.copy_(self.data[slot])
        if not np.array_equal(block_sums(into).numpy(), self._stamps["sums"][slot]):
            raise BadBlock("the checksum does not match the block")

    def stamp(self, key: bytes, slot: int) -> bytes | None:
        """See `stamp`; thread-safe, for reading before and after a block is copied."""
        return stamp(self._stamps, key, slot)

    def sums(self, stamp: bytes) -> npt.NDArray[np.int64]:
        """Checksums [L, 2, K] of a stamp."""
        return sums(stamp, self._shard)

    def close(self) -> None:
        """Free the memory."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.data.data_ptr())  # type: ignore[no-untyped-call]
        del self.data, self._stamps
        with contextlib.suppress(BufferError):  # a reader still uses it: freed with the reader
            self._map.close()
        os.close(self._fd)


def stamp_type(shard: BlockShard) -> np.dtype[np.void]:
    """Data type of a slot's stamp; see `block_sums` for the checksums."""
    shape = (shard.layers[1] - shard.layers[0], 2, shard.heads[1] - shard.heads[0])
    return np.dtype([("key", np.uint8, KEY_BYTES), ("times", "<u8"), ("sums", "<i8", shape)])


def sums(stamp: bytes, shard: BlockShard) -> npt.NDArray[np.int64]:
    """Checksums [L, 2, K] of a stamp."""
    checksums: npt.NDArray[np.int64] = np.frombuffer(stamp, dtype=stamp_type(shard))["sums"][0]
    return checksums


def memory_bytes(form: BlockForm, shard: BlockShard, slots: int) -> int:
    """Bytes of a pool's memory, stamps included."""
    return slots * (form.nbytes(shard) + stamp_type(shard).itemsize)


def stamp(stamps: Stamps, key: bytes, slot: int) -> bytes | None:
    """Stamp of a slot with a block of this key, if complete; an equal stamp means equal bytes."""
    if not 0 <= slot < len(stamps):
        return None
    data: bytes = stamps[slot].tobytes()
    return data if data.startswith(key) else None


def views(
    memory: mmap.mmap, form: BlockForm, shard: BlockShard, slots: int
) -> tuple[Tensor, Stamps]:
    """Views of a memory: (blocks [slots, L, 2, K, P, D], stamps [slots])."""
    nbytes = slots * form.nbytes(shard)
    whole = np.frombuffer(memory, dtype=np.uint8)
    stamps = whole[nbytes:].view(stamp_type(shard))
    # torch has no read-only tensors and would warn; readers never write
    address = int(whole.ctypes.data)
    data = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=form.dtype)
    return data.reshape(slots, *form.shape(shard)), stamps

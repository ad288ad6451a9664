"""Blocks in host memory: one rank's slots, which processes of the same node may read.

The memory is an anonymous file (memfd) that goes with the last process that has it, however that
process ends. Its tail holds a stamp for each slot: the key of the block that is whole there, how
often the slot was written, and the block's checksums. A reader (see `peer`) looks at it before and
after it copies, so it needs no lock and no word from the owner: a slot that was given another block
meanwhile is a miss, also when the first one is there again by then; so is one with a flipped bit.

Knows slots and bytes; which block is where is the leader's.

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
    """Slots of one rank.

    Attributes:
        data: [slots, L, 2, K, P, D].
    """

    def __init__(self, form: BlockForm, piece: BlockShard, slots: int, *, pinned: bool) -> None:
        """Reserve the memory; pages are taken as slots are first written.

        Args:
            form: of blocks.
            piece: what this rank holds of each.
            slots: how many blocks.
            pinned: lock the pages and tell CUDA, so that copies run beside the device's work.
        """
        self._form, self._piece, self._slots = form, piece, slots
        self._name = f"arriero-kv-{uuid.uuid4().hex}"
        self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, memory_bytes(form, piece, slots))
            self._map = mmap.mmap(self._fd, 0)
        except BaseException:
            os.close(self._fd)
            raise
        self.data, self._stamps = views(self._map, form, piece, slots)
        self._pinned = False
        if pinned:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = cudart.cudaHostRegister(self.data.data_ptr(), self.data.nbytes, 0)
            self._pinned = int(status) == 0

    @property
    def memory(self) -> tuple[int, int]:
        """Address and bytes of it all, stamps behind the blocks."""
        return self.data.data_ptr(), memory_bytes(self._form, self._piece, self._slots)

    @property
    def segment(self) -> Segment:
        """What others of this node need to read it."""
        return Segment(
            pid=os.getpid(),
            fd=self._fd,
            name=self._name,
            host=host_name(),
            layers=self._piece.layers,
            heads=self._piece.heads,
            block=(self._form.positions, self._form.dim, self._form.dtype.itemsize),
            slots=self._slots,
        )

    def put(self, slots: Sequence[int], keys: Sequence[bytes], data: Tensor) -> None:
        """Write blocks [N, L, 2, K, P, D] into slots."""
        at, stamps = list(slots), self._stamps
        stamps["key"][at] = 0
        stamps["times"][at] += 1
        stamps["sums"][at] = block_sums(data).numpy()
        self.data[at] = data
        for slot, key in zip(at, keys, strict=True):
            stamps["key"][slot] = np.frombuffer(key, dtype=np.uint8)

    def get(self, key: bytes, slot: int, into: Tensor) -> None:
        """Copy a block, `into` [L, 2, K, P, D].

        Raises:
            BadBlock: the slot holds something else, or its bytes have changed.
        """
        if self.stamp(key, slot) is None:
            raise BadBlock("the slot holds another block")
        into.copy_(self.data[slot])
        if not np.array_equal(block_sums(into).numpy(), self._stamps["sums"][slot]):
            raise BadBlock("the checksum is not this block's")

    def stamp(self, key: bytes, slot: int) -> bytes | None:
        """See `stamp`; from any thread, before and after a block is read."""
        return stamp(self._stamps, key, slot)

    def sums(self, stamp: bytes) -> npt.NDArray[np.int64]:
        """The checksums [L, 2, K] in a stamp."""
        return sums(stamp, self._piece)

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.data.data_ptr())  # type: ignore[no-untyped-call]
        del self.data, self._stamps
        with contextlib.suppress(BufferError):  # someone looks at it still: it goes with them
            self._map.close()
        os.close(self._fd)


def stamp_type(piece: BlockShard) -> np.dtype[np.void]:
    """Of a slot's stamp: see `block_sums` for its checksums."""
    shape = (piece.layers[1] - piece.layers[0], 2, piece.heads[1] - piece.heads[0])
    return np.dtype([("key", np.uint8, KEY_BYTES), ("times", "<u8"), ("sums", "<i8", shape)])


def sums(stamp: bytes, piece: BlockShard) -> npt.NDArray[np.int64]:
    """The checksums [L, 2, K] in a stamp."""
    found: npt.NDArray[np.int64] = np.frombuffer(stamp, dtype=stamp_type(piece))["sums"][0]
    return found


def memory_bytes(form: BlockForm, piece: BlockShard, slots: int) -> int:
    """Of a pool's memory, stamps and all."""
    return slots * (form.nbytes(piece) + stamp_type(piece).itemsize)


def stamp(stamps: Stamps, key: bytes, slot: int) -> bytes | None:
    """The slot's stamp if it holds a block, whole; as long as it is the same, so is the block."""
    if not 0 <= slot < len(stamps):
        return None
    found: bytes = stamps[slot].tobytes()
    return found if found.startswith(key) else None


def views(
    memory: mmap.mmap, form: BlockForm, piece: BlockShard, slots: int
) -> tuple[Tensor, Stamps]:
    """(blocks [slots, L, 2, K, P, D], stamps [slots]) of a memory."""
    nbytes = slots * form.nbytes(piece)
    whole = np.frombuffer(memory, dtype=np.uint8)
    stamps = whole[nbytes:].view(stamp_type(piece))
    # torch has no read-only tensors and would warn; readers never write
    address = int(whole.ctypes.data)
    data = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=form.dtype)
    return data.reshape(slots, *form.shape(piece)), stamps

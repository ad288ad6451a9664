"""Blocks in host memory: one rank's slots, which processes of the same node may read.

The memory is an anonymous file (memfd) that goes with the last process that has it, however that
process ends. Its tail holds, for each slot, the key of the block that is whole there. A reader
checks the key before and after it copies, so it needs no lock and no word from the owner: a slot
that is given another block meanwhile is a miss.

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

from arriero.shards.kv.machine import host_name
from arriero.shards.kv.moves import Segment
from arriero.shards.kv.pieces import BadBlock, BlockForm, Piece

KEY_BYTES = 16
_NOTHING = bytes(KEY_BYTES)


class HostPool:
    """Slots of one rank.

    Attributes:
        data: [slots, L, 2, K, P, D].
    """

    def __init__(self, form: BlockForm, piece: Piece, slots: int, *, pinned: bool) -> None:
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
            os.ftruncate(self._fd, slots * (form.nbytes(piece) + KEY_BYTES))
            self._map = mmap.mmap(self._fd, 0)
        except BaseException:
            os.close(self._fd)
            raise
        self.data, self._keys = _views(self._map, form, piece, slots)
        self._pinned = False
        if pinned:
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = cudart.cudaHostRegister(self.data.data_ptr(), self.data.nbytes, 0)
            self._pinned = int(status) == 0

    @property
    def segment(self) -> Segment:
        """What others need to read it."""
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

    def begin(self, slots: Sequence[int]) -> None:
        """The slots' blocks are about to change."""
        self._keys[list(slots)] = 0

    def end(self, slots: Sequence[int], keys: Sequence[bytes]) -> None:
        """The slots hold these blocks, whole."""
        for slot, key in zip(slots, keys, strict=True):
            self._keys[slot] = np.frombuffer(key, dtype=np.uint8)

    def get(self, key: bytes, slot: int, into: Tensor) -> None:
        """Copy a block, `into` [L, 2, K, P, D].

        Raises:
            BadBlock: the slot holds something else.
        """
        if self._keys[slot].tobytes() != key:
            raise BadBlock("the slot holds another block")
        into.copy_(self.data[slot])

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.data.data_ptr())  # type: ignore[no-untyped-call]
        del self.data, self._keys
        with contextlib.suppress(BufferError):  # someone looks at it still: it goes with them
            self._map.close()
        os.close(self._fd)


class PeerPool:
    """Another group's slots on this node, of all its ranks, to read from.

    Raises:
        BadBlock: they are not to be had: another node, the process is gone, another form.
    """

    def __init__(self, segments: Sequence[Segment], form: BlockForm, piece: Piece) -> None:
        self._piece, self._form = piece, form
        self._parts: list[tuple[Piece, Tensor, npt.NDArray[np.uint8]]] = []
        self._maps: list[mmap.mmap] = []
        if not piece.covered_by(Piece(one.layers, one.heads) for one in segments):
            raise BadBlock("the peer's ranks do not hold all of it")
        used: list[Piece] = []
        try:
            for one in segments:
                theirs = Piece(one.layers, one.heads)
                if theirs.overlap(piece) is None or piece.covered_by(used):
                    continue
                used.append(theirs)
                self._maps.append(_attach(one, form))
                self._parts.append((theirs, *_views(self._maps[-1], form, theirs, one.slots)))
        except BaseException:
            self.close()
            raise

    def get(self, key: bytes, slot: int, into: Tensor) -> None:
        """Fill our piece of a block, `into` [L, 2, K, P, D].

        Raises:
            BadBlock: the slot holds, or came to hold, something else.
        """
        for theirs, data, keys in self._parts:
            part = theirs.overlap(self._piece)
            assert part is not None, "attached for nothing"
            ours, there = part.within(self._piece), part.within(theirs)
            if not 0 <= slot < len(keys) or keys[slot].tobytes() != key:
                raise BadBlock("the peer has another block there")
            into[ours[0], :, ours[1]] = data[slot, there[0], :, there[1]]
            if keys[slot].tobytes() != key:
                raise BadBlock("the peer gave the slot away meanwhile")

    def close(self) -> None:
        """Let go of the memory."""
        self._parts.clear()
        for one in self._maps:
            with contextlib.suppress(BufferError):
                one.close()
        self._maps.clear()


def _attach(segment: Segment, form: BlockForm) -> mmap.mmap:
    if segment.host != host_name():
        raise BadBlock("the peer is on another node")
    if segment.block != (form.positions, form.dim, form.dtype.itemsize):
        raise BadBlock("the peer's blocks are of another form")
    path = f"/proc/{segment.pid}/fd/{segment.fd}"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadBlock(f"the peer's memory is not to be had: {error.strerror}") from None
    try:
        if segment.name not in os.readlink(f"/proc/self/fd/{fd}"):
            raise BadBlock("the peer's process is gone")
        size = segment.slots * (form.nbytes(Piece(segment.layers, segment.heads)) + KEY_BYTES)
        if os.fstat(fd).st_size != size:
            raise BadBlock("the peer's memory is of another size")
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _views(
    memory: mmap.mmap, form: BlockForm, piece: Piece, slots: int
) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """(blocks [slots, L, 2, K, P, D], keys [slots, 16]) of a memory."""
    nbytes = slots * form.nbytes(piece)
    whole = np.frombuffer(memory, dtype=np.uint8)
    keys = whole[nbytes:].reshape(slots, KEY_BYTES)
    # torch has no read-only tensors and would warn; readers never write
    address = int(whole.ctypes.data)
    data = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=form.dtype)
    return data.reshape(slots, *form.shape(piece)), keys

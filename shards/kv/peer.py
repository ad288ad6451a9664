"""Another group's host memory, for copying blocks: each rank's part by the best way.

Ranks of the peer may have other layers and heads than this rank: the rank's shard of a block is
built from all ranks that overlap the shard. A peer rank on this node is read in shared memory; a
rank on another node through NIXL where both have NIXL (see `nixl`), else over TCP (see `tcp`). Any
error, a wrong checksum too, is a missing block.

Knows shards and their overlaps; the leaders know which block is in which slot.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.checksums import block_sums
from arriero.shards.kv.host import memory_bytes, stamp, sums, views
from arriero.shards.kv.host_id import host_name
from arriero.shards.kv.nixl import NixlPart, NixlReader
from arriero.shards.kv.tcp import RemotePart
from arriero.shards.kv.transfers import Segment

log = logging.getLogger(__name__)

LOST_S = 5.0
"""Seconds without another try after a lost peer: each try might take a second."""
BlockSlots = Sequence[tuple[bytes, int]]
"""Blocks by key and slot."""
Sums = npt.NDArray[np.int64]
"""Checksums [l, 2, h] of a part of a block."""


class PeerPart(Protocol):
    """Memory of one peer rank, read for a part of each block."""

    def request(self, blocks: BlockSlots) -> None:
        """Set the blocks that `get` returns, in this order; may raise `BadBlock`."""

    def get(self, into: Tensor) -> Sums | None:
        """Copy the next block, [l, 2, h, P, D]; may raise `BadBlock`.

        Returns:
            The checksums from the time of writing; None when the block is missing.
        """

    def close(self) -> None:
        """Close the connection."""


class LocalPart:
    """Memory of a peer rank on this node.

    Raises:
        BadBlock: the memory cannot be opened.
    """

    def __init__(self, segment: Segment, form: BlockForm, part: BlockShard) -> None:
        self._theirs = BlockShard(segment.layers, segment.heads)
        self._map = _attach(segment, form)
        self._data, self._stamps = views(self._map, form, self._theirs, segment.slots)
        self._layers, self._heads = part.within(self._theirs)
        self._blocks: Iterator[tuple[bytes, int]] = iter(())

    def request(self, blocks: BlockSlots) -> None:
        """See `PeerPart`."""
        self._blocks = iter(blocks)

    def get(self, into: Tensor) -> Sums | None:
        """See `PeerPart`."""
        key, slot = next(self._blocks)
        before = stamp(self._stamps, key, slot)
        if before is None:
            return None
        into.copy_(self._data[slot, self._layers, :, self._heads])
        if stamp(self._stamps, key, slot) != before:
            return None
        return sums(before, self._theirs)[self._layers, :, self._heads]

    def close(self) -> None:
        """See `PeerPart`."""
        del self._data, self._stamps
        with contextlib.suppress(BufferError):
            self._map.close()


class PeerPool:
    """Memory of all peer ranks that overlap this rank's shard.

    Args:
        segments: memory of each peer rank.
        form: format of the blocks.
        shard: this rank's shard of each block.
        nixl: reader through NIXL, if enabled; belongs to the copying thread.

    Raises:
        BadBlock: a memory cannot be opened, or the ranks do not cover the shard.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        form: BlockForm,
        shard: BlockShard,
        nixl: NixlReader | None = None,
    ) -> None:
        self._parts: list[tuple[tuple[slice, slice], PeerPart]] = []
        self._lost_until_s = 0.0
        if not shard.covered_by(BlockShard(s.layers, s.heads) for s in segments):
            raise BadBlock("the peer's ranks do not cover this rank's shard")
        used: list[BlockShard] = []
        try:
            for segment in segments:
                theirs = BlockShard(segment.layers, segment.heads)
                part = theirs.overlap(shard)
                if part is not None and not shard.covered_by(used):
                    used.append(theirs)
                    self._parts.append((part.within(shard), _part(segment, form, part, nixl)))
        except BaseException:
            self.close()
            raise

    def copy(self, blocks: BlockSlots, into: Tensor) -> set[int]:
        """Fill this rank's shard of blocks, `into` [N, L, 2, K, P, D]; returns missing blocks."""
        failed: set[int] = set()
        if time.monotonic() < self._lost_until_s:
            return set(range(len(blocks)))
        try:
            for _, part in self._parts:
                part.request(blocks)
            for i, block in enumerate(into):
                for (layers, heads), part in self._parts:
                    view = block[layers, :, heads]
                    sums = part.get(view)
                    if sums is None:
                        failed.add(i)
                    elif not np.array_equal(block_sums(view).numpy(), sums):
                        log.warning("a peer's block %s has a wrong checksum", blocks[i][0].hex())
                        failed.add(i)
        except BadBlock as error:
            log.warning("a peer's blocks are computed here instead: %s", error)
            self._lost_until_s = time.monotonic() + LOST_S
            return set(range(len(blocks)))
        return failed

    def close(self) -> None:
        """Close the memory of all peer ranks."""
        for _, part in self._parts:
            part.close()
        self._parts.clear()


def _part(segment: Segment, form: BlockForm, part: BlockShard, nixl: NixlReader | None) -> PeerPart:
    if segment.block != (form.positions, form.dim, form.dtype.itemsize):
        raise BadBlock("the peer's blocks have another format")
    if segment.host == host_name():
        try:
            return LocalPart(segment, form, part)
        except BadBlock:
            if not segment.address:  # the process may be in another container
                raise
    if nixl is not None and segment.nixl is not None:
        return NixlPart(nixl, segment, segment.nixl, form, part)
    if not segment.address:
        raise BadBlock("the peer is on another node and has no server")
    return RemotePart(segment, form, part)


def _attach(segment: Segment, form: BlockForm) -> mmap.mmap:
    path = f"/proc/{segment.pid}/fd/{segment.fd}"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadBlock(f"the peer's memory cannot be opened: {error.strerror}") from None
    try:
        if segment.name not in os.readlink(f"/proc/self/fd/{fd}"):
            raise BadBlock("the peer's process has ended")
        theirs = BlockShard(segment.layers, segment.heads)
        if os.fstat(fd).st_size != memory_bytes(form, theirs, segment.slots):
            raise BadBlock("the peer's memory has another size")
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)

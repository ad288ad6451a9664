"""Another group's host memory, to copy blocks from: each of its ranks' part by the way there is.

Ranks of the peer may hold other layers and heads than we do: our piece of a block is put together
from all that overlap it. A rank on this node is read in its memory; one on another node through
NIXL where both have it (see `nixl`), else over TCP (see `wire`). Whatever is wrong, a checksum too,
is a missing block.

Knows pieces and parts; which block is where is the leaders'.
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
"""A peer that was lost is not asked again for so long: each time might be a second's wait."""
Wanted = Sequence[tuple[bytes, int]]
"""Blocks by key and slot."""
Sums = npt.NDArray[np.int64]
"""Checksums [l, 2, h] of a part of a block."""


class PeerPart(Protocol):
    """One rank's memory, of which we want a part of each block."""

    def ask(self, wanted: Wanted) -> None:
        """Say which blocks `get` is to give, in this order; may raise `BadBlock`."""

    def get(self, into: Tensor) -> Sums | None:
        """Copy the next one, [l, 2, h, P, D]; may raise `BadBlock`.

        Returns:
            The checksums that it had when it was written; None when it is not there.
        """

    def close(self) -> None:
        """Let go."""


class LocalPart:
    """A rank of this node.

    Raises:
        BadBlock: its memory is not to be had.
    """

    def __init__(self, segment: Segment, form: BlockForm, part: BlockShard) -> None:
        self._theirs = BlockShard(segment.layers, segment.heads)
        self._map = _attach(segment, form)
        self._data, self._stamps = views(self._map, form, self._theirs, segment.slots)
        self._layers, self._heads = part.within(self._theirs)
        self._wanted: Iterator[tuple[bytes, int]] = iter(())

    def ask(self, wanted: Wanted) -> None:
        """See `PeerPart`."""
        self._wanted = iter(wanted)

    def get(self, into: Tensor) -> Sums | None:
        """See `PeerPart`."""
        key, slot = next(self._wanted)
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
    """All ranks of a peer that hold something of our piece.

    Args:
        segments: of the ranks.
        form: of blocks.
        piece: what we hold of each.
        nixl: reads through NIXL, if this rank does; of the thread that copies.

    Raises:
        BadBlock: they are not to be had, or do not hold all of it.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        form: BlockForm,
        piece: BlockShard,
        nixl: NixlReader | None = None,
    ) -> None:
        self._parts: list[tuple[tuple[slice, slice], PeerPart]] = []
        self._lost_until_s = 0.0
        if not piece.covered_by(BlockShard(one.layers, one.heads) for one in segments):
            raise BadBlock("the peer's ranks do not hold all of it")
        used: list[BlockShard] = []
        try:
            for one in segments:
                theirs = BlockShard(one.layers, one.heads)
                part = theirs.overlap(piece)
                if part is not None and not piece.covered_by(used):
                    used.append(theirs)
                    self._parts.append((part.within(piece), _part(one, form, part, nixl)))
        except BaseException:
            self.close()
            raise

    def copy(self, wanted: Wanted, into: Tensor) -> set[int]:
        """Fill our piece of blocks, `into` [N, L, 2, K, P, D]; gives those that are not there."""
        failed: set[int] = set()
        if time.monotonic() < self._lost_until_s:
            return set(range(len(wanted)))
        try:
            for _, part in self._parts:
                part.ask(wanted)
            for i, block in enumerate(into):
                for (layers, heads), part in self._parts:
                    ours = block[layers, :, heads]
                    due = part.get(ours)
                    if due is None:
                        failed.add(i)
                    elif not np.array_equal(block_sums(ours).numpy(), due):
                        log.warning("a peer's block %s came spoilt", wanted[i][0].hex())
                        failed.add(i)
        except BadBlock as error:
            log.warning("a peer's blocks are computed instead: %s", error)
            self._lost_until_s = time.monotonic() + LOST_S
            return set(range(len(wanted)))
        return failed

    def close(self) -> None:
        """Let go of the ranks."""
        for _, part in self._parts:
            part.close()
        self._parts.clear()


def _part(segment: Segment, form: BlockForm, part: BlockShard, nixl: NixlReader | None) -> PeerPart:
    if segment.block != (form.positions, form.dim, form.dtype.itemsize):
        raise BadBlock("the peer's blocks are of another form")
    if segment.host == host_name():
        try:
            return LocalPart(segment, form, part)
        except BadBlock:
            if not segment.address:  # it may be in another container
                raise
    if nixl is not None and segment.nixl:
        return NixlPart(nixl, segment, form, part)
    if not segment.address:
        raise BadBlock("the peer is on another node and serves nobody there")
    return RemotePart(segment, form, part)


def _attach(segment: Segment, form: BlockForm) -> mmap.mmap:
    path = f"/proc/{segment.pid}/fd/{segment.fd}"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadBlock(f"the peer's memory is not to be had: {error.strerror}") from None
    try:
        if segment.name not in os.readlink(f"/proc/self/fd/{fd}"):
            raise BadBlock("the peer's process is gone")
        theirs = BlockShard(segment.layers, segment.heads)
        if os.fstat(fd).st_size != memory_bytes(form, theirs, segment.slots):
            raise BadBlock("the peer's memory is of another size")
        return mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    finally:
        os.close(fd)

"""One-sided reads of a peer's host memory through NIXL, DRAM to DRAM.

NIXL (github.com/ai-dynamo/nixl, over UCX) has the network card fetch from the peer's registered
memory, and the peer's processor takes no part. So a reader fetches a slot's stamp, the part of the
block that it needs, and the stamp again: what `peer` does in memory of its own node. Where there is
no such card UCX copies by other ways, which gain nothing over our own TCP (see `wire`); so this is
used where cards are, or where it is asked for, and both ends have NIXL installed.

Knows addresses and reads; which block is where is the leaders'.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.host import HostPool, stamp_type, sums
from arriero.shards.kv.transfers import Segment

log = logging.getLogger(__name__)

SILENCE_S = 3.0
"""A read that takes so long is given up, and its peer with it."""
PROGRESS_S = 0.001
"""How often an owner looks after readers that begin. NIXL's own thread would take a whole core."""
_CARDS = Path("/sys/class/infiniband")
_stuck: list[object] = []
"""Memory that a read which cannot be called back may still write to: kept for good."""

Addresses = npt.NDArray[np.uint64]


def wanted(transfer: Literal["auto", "tcp", "nixl"]) -> bool:
    """Whether blocks are to be read through NIXL here, where the other side has it too.

    Args:
        transfer: "auto" for where network cards do the reading.
    """
    if transfer == "tcp" or (transfer == "auto" and not any(_CARDS.glob("*"))):
        return False
    try:
        _nixl()
    except ImportError as error:
        asked = logging.WARNING if transfer == "nixl" else logging.INFO
        log.log(asked, "KV blocks travel over TCP: no NIXL (%s); install arriero[nixl]", error)
        return False
    return True


def _nixl() -> Any:  # noqa: ANN401
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else it tells of every agent on stdout
    os.environ.setdefault("UCX_LOG_LEVEL", "error")  # and of what a peer that died left undone
    import nixl._api

    return nixl._api


def _agent() -> Any:  # noqa: ANN401
    api = _nixl()
    config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    return api.nixl_agent(f"arriero-{uuid.uuid4().hex}", config)


class NixlServer:
    """Lets readers at one rank's host memory.

    Registered memory is held by the cards: all its pages are taken at once.

    Args:
        pool: the memory.

    Attributes:
        told: what a reader must know.

    Raises:
        Exception: whatever NIXL finds wrong.
    """

    def __init__(self, pool: HostPool) -> None:
        self._agent = _agent()
        address, nbytes = pool.memory
        self._memory = self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")
        self.told: bytes = msgpack.packb([self._agent.get_agent_metadata(), address])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="kv-nixl", daemon=True)
        self._thread.start()

    def _look_after(self) -> None:
        while not self._ended.wait(PROGRESS_S):
            self._agent.get_new_notifs()

    def close(self) -> None:
        """End; what readers have under way fails."""
        self._ended.set()
        self._thread.join()
        self._agent.deregister_memory(self._memory)
        del self._agent


class NixlReader:
    """What one thread reads peers through."""

    def __init__(self) -> None:
        self._agent: Any = _agent()

    def join(self, metadata: bytes) -> bytes:
        """Get to know a peer's agent; gives its name."""
        name: bytes = self._agent.add_remote_agent(metadata)
        return name

    def leave(self, peer: bytes) -> None:
        """Forget a peer's agent."""
        self._agent.remove_remote_agent(peer)

    def register(self, memory: Tensor) -> object:
        """Let reads write into memory, until `deregister` of what this gives."""
        runs = [(memory.data_ptr(), memory.nbytes, 0, "")]
        registered: object = self._agent.register_memory(runs, "DRAM")
        return registered

    def deregister(self, registered: object) -> None:
        """Undo `register`."""
        self._agent.deregister_memory(registered)

    def read(self, peer: bytes, theirs: Addresses, ours: Addresses, memory: object) -> None:
        """Fetch runs of a peer's memory into ours, one for one.

        Args:
            peer: its agent.
            theirs: the runs, [N, 3] of address, bytes and device.
            ours: likewise, in registered memory.
            memory: kept as long as anything may write there.

        Raises:
            BadBlock: nothing came for a while.
            Exception: whatever NIXL finds wrong.
        """
        agent = self._agent
        into, source = (agent.get_xfer_descs(runs, "DRAM") for runs in (ours, theirs))
        handle = agent.initialize_xfer("READ", into, source, peer)
        try:
            deadline_s = time.monotonic() + SILENCE_S
            state = agent.transfer(handle)
            while state == "PROC" and time.monotonic() < deadline_s:
                time.sleep(0)
                state = agent.check_xfer_state(handle)
        finally:
            try:
                agent.release_xfer_handle(handle)
            except Exception:
                _stuck.append((agent, memory))
                raise
        if state != "DONE":
            raise BadBlock("it fell silent" if state == "PROC" else "the read failed")


class NixlPart:
    """One rank's memory, of which we want a part of each block; see `peer.Part`.

    Args:
        reader: of this thread.
        segment: the memory.
        form: of blocks.
        part: what is wanted of each block: a part of the segment's own piece.

    Raises:
        BadBlock: what the segment says of its agent cannot be used.
    """

    def __init__(
        self, reader: NixlReader, segment: Segment, form: BlockForm, part: BlockShard
    ) -> None:
        self._reader, self._form, self._part = reader, form, part
        self._theirs = BlockShard(segment.layers, segment.heads)
        self._slots = segment.slots
        try:
            self._metadata, self._base = msgpack.unpackb(segment.nixl)
        except ValueError as error:
            raise BadBlock(f"the peer's agent is not to be had: {error}") from None
        self._peer: bytes | None = None
        self._memory: Tensor | None = None
        self._registered: object = None
        self._answers: Iterator[tuple[bytes, Tensor] | None] = iter(())
        self._stamp_bytes = stamp_type(self._theirs).itemsize
        self._runs = _runs(form, self._theirs, part)

    def ask(self, wanted: Sequence[tuple[bytes, int]]) -> None:
        """See `peer.Part`: fetches them all."""
        try:
            if self._peer is None:
                self._peer = self._reader.join(self._metadata)
            self._answers = iter(self._fetch(wanted))
        except Exception as error:  # NIXL's own kinds of error, of a peer that is gone or no peer
            self.close()
            raise BadBlock(f"a rank's memory over NIXL: {type(error).__name__} {error}") from None

    def get(self, into: Tensor) -> npt.NDArray[np.int64] | None:
        """See `peer.Part`."""
        found = next(self._answers)
        if found is None:
            return None
        stamp, block = found
        into.copy_(block)
        layers, heads = self._part.within(self._theirs)
        return sums(stamp, self._theirs)[layers, :, heads]

    def close(self) -> None:
        """See `peer.Part`."""
        self._answers = iter(())
        try:
            if self._peer is not None:
                self._reader.leave(self._peer)
            if self._registered is not None:
                self._reader.deregister(self._registered)
        except Exception as error:  # it is lost already
            log.info("a peer's agent: %s", error)
        self._peer = self._memory = self._registered = None

    def _fetch(self, wanted: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, Tensor] | None]:
        known = [i for i, (_, slot) in enumerate(wanted) if 0 <= slot < self._slots]
        slots = np.array([slot for _, slot in wanted], dtype=np.uint64)
        memory = self._room(len(known))
        before = dict(zip(known, self._stamps(slots[known], memory), strict=True))
        good = [i for i in known if before[i].startswith(wanted[i][0])]
        blocks = self._blocks(slots[good], memory)
        answers: list[tuple[bytes, Tensor] | None] = [None] * len(wanted)
        for i, block, after in zip(good, blocks, self._stamps(slots[good], memory), strict=True):
            if after == before[i]:
                answers[i] = (after, block)
        return answers

    def _room(self, count: int) -> Tensor:
        """Registered memory: for so many stamps, and behind them as many blocks."""
        needed = count * (self._stamp_bytes + self._form.nbytes(self._part))
        if self._memory is None or self._memory.nbytes < needed:
            if self._registered is not None:
                self._reader.deregister(self._registered)
            self._memory = torch.empty(needed, dtype=torch.uint8)
            self._registered = self._reader.register(self._memory)
        return self._memory

    def _stamps(self, slots: Addresses, memory: Tensor) -> list[bytes]:
        """Stamps of slots, as they are now."""
        size = self._stamp_bytes
        first = self._base + self._slots * self._form.nbytes(self._theirs)
        places = np.uint64(first) + slots * np.uint64(size)
        found = self._read(places, np.array([[0, size]], dtype=np.uint64), memory)
        return [one.numpy().tobytes() for one in found.view(len(slots), size)]

    def _blocks(self, slots: Addresses, memory: Tensor) -> Tensor:
        """Our part of blocks, [N, l, 2, h, P, D]."""
        places = np.uint64(self._base) + slots * np.uint64(self._form.nbytes(self._theirs))
        behind = memory[len(memory) - len(slots) * self._form.nbytes(self._part) :]
        found = self._read(places, self._runs, behind)
        return found.view(self._form.dtype).view(len(slots), *self._form.shape(self._part))

    def _read(self, places: Addresses, runs: Addresses, memory: Tensor) -> Tensor:
        """Fetch the same runs behind each of some addresses; they lie one behind the other."""
        sizes = np.tile(runs[:, 1], len(places))
        nbytes = int(sizes.sum())
        if nbytes:
            theirs = (places[:, None] + runs[:, 0]).reshape(-1)
            ours = np.uint64(memory.data_ptr()) + np.cumsum(sizes) - sizes
            device = np.zeros_like(sizes)
            assert self._peer is not None, "no peer"
            self._reader.read(
                self._peer,
                np.stack([theirs, sizes, device], axis=1),
                np.stack([ours, sizes, device], axis=1),
                memory,
            )
        return memory[:nbytes]


def _runs(form: BlockForm, theirs: BlockShard, part: BlockShard) -> Addresses:
    """Where a part's bytes lie in a block of `theirs`: [N, 2] of offset and length."""
    (layers, heads), shape = part.within(theirs), form.shape(theirs)
    row, num_heads = form.positions * form.dim * form.dtype.itemsize, shape[2]
    if heads == slice(0, num_heads):
        size = 2 * num_heads * row
        return np.array([[layers.start * size, (layers.stop - layers.start) * size]], np.uint64)
    first = np.arange(2 * layers.start, 2 * layers.stop, dtype=np.uint64) * np.uint64(num_heads)
    offsets = (first + np.uint64(heads.start)) * np.uint64(row)
    return np.stack([offsets, np.full_like(offsets, (heads.stop - heads.start) * row)], axis=1)

"""One-sided reads of a peer's host memory through NIXL, DRAM to DRAM.

With NIXL (github.com/ai-dynamo/nixl, over UCX) the network card reads the peer's registered memory,
without the peer's processor. So a reader fetches a slot's stamp, the needed part of the block, and
the stamp again, as `peer` does in the memory of its own node. Without such a card UCX copies by
other ways, which are no faster than our own TCP (see `tcp`). So NIXL is used where there are cards,
or where the spec requires it, and both ends have NIXL installed.

Knows addresses and reads; the leaders know which block is in which slot.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.host import HostPool, stamp_type, sums
from arriero.shards.kv.transfers import NixlMemory, Segment

log = logging.getLogger(__name__)

SILENCE_S = 3.0
"""Seconds after which a read is given up, and its peer with it."""
PROGRESS_S = 0.001
"""Seconds between two polls for new readers. NIXL's own thread would take a whole core."""
_CARDS = Path("/sys/class/infiniband")
_stuck: list[object] = []
"""Memory that a read which cannot be cancelled may still write to: never freed."""

Addresses = npt.NDArray[np.uint64]


class _Agent(Protocol):
    """The part of NIXL's untyped agent that is used here; `object` stands for its own handles."""

    def get_agent_metadata(self) -> bytes: ...
    def add_remote_agent(self, metadata: bytes) -> bytes: ...
    def remove_remote_agent(self, name: bytes) -> None: ...
    def get_new_notifs(self) -> object: ...
    def register_memory(self, runs: list[tuple[int, int, int, str]], kind: str) -> object: ...
    def deregister_memory(self, registered: object) -> None: ...
    def get_xfer_descs(self, runs: Addresses, kind: str) -> object: ...
    def initialize_xfer(self, way: str, into: object, source: object, peer: bytes) -> object: ...
    def transfer(self, handle: object) -> str: ...
    def check_xfer_state(self, handle: object) -> str: ...
    def release_xfer_handle(self, handle: object) -> None: ...


def enabled(transfer: Literal["auto", "tcp", "nixl"]) -> bool:
    """Whether this rank reads blocks through NIXL, where the other side has NIXL too.

    Args:
        transfer: way of transfer; "auto" means NIXL if there are network cards.
    """
    if transfer == "tcp" or (transfer == "auto" and not any(_CARDS.glob("*"))):
        return False
    try:
        _nixl()
    except ImportError as error:
        level = logging.WARNING if transfer == "nixl" else logging.INFO
        log.log(level, "KV blocks travel over TCP: no NIXL (%s); install arriero[nixl]", error)
        return False
    return True


def _nixl() -> ModuleType:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # else NIXL prints every agent to stdout
    os.environ.setdefault("UCX_LOG_LEVEL", "error")  # and UCX the open requests of dead peers
    import nixl._api

    api: ModuleType = nixl._api
    return api


def _agent() -> _Agent:
    api = _nixl()
    config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    agent: _Agent = api.nixl_agent(f"arriero-{uuid.uuid4().hex}", config)
    return agent


class NixlServer:
    """Gives readers access to one rank's host memory.

    The cards lock registered memory: all its pages are allocated at once.

    Args:
        pool: the memory.

    Attributes:
        memory: agent and address, for readers.

    Raises:
        Exception: any error of NIXL.
    """

    def __init__(self, pool: HostPool) -> None:
        self._agent = _agent()
        address, nbytes = pool.memory
        self._registered = self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")
        self.memory = NixlMemory(self._agent.get_agent_metadata(), address)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="kv-nixl", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._ended.wait(PROGRESS_S):
            self._agent.get_new_notifs()

    def close(self) -> None:
        """Stop; reads in flight fail."""
        self._ended.set()
        self._thread.join()
        self._agent.deregister_memory(self._registered)
        del self._agent


class NixlReader:
    """Reads peers' memory; belongs to one thread."""

    def __init__(self) -> None:
        self._agent = _agent()

    def join(self, metadata: bytes) -> bytes:
        """Add a peer's agent; returns its name."""
        return self._agent.add_remote_agent(metadata)

    def leave(self, peer: bytes) -> None:
        """Remove a peer's agent."""
        self._agent.remove_remote_agent(peer)

    def register(self, memory: Tensor) -> object:
        """Allow reads to write into memory, until `deregister` of the returned handle."""
        runs = [(memory.data_ptr(), memory.nbytes, 0, "")]
        return self._agent.register_memory(runs, "DRAM")

    def deregister(self, registered: object) -> None:
        """Undo `register`."""
        self._agent.deregister_memory(registered)

    def read(self, peer: bytes, theirs: Addresses, ours: Addresses, memory: object) -> None:
        """Fetch ranges of a peer's memory into local ranges, pair by pair.

        Args:
            peer: name of the peer's agent.
            theirs: ranges of the peer, [N, 3] of address, bytes and device.
            ours: local ranges, likewise, in registered memory.
            memory: object kept alive as long as NIXL may write there.

        Raises:
            BadBlock: the read took too long.
            Exception: any error of NIXL.
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
            raise BadBlock("the peer stopped responding" if state == "PROC" else "the read failed")


class NixlPart:
    """Memory of one peer rank, read for a part of each block; see `peer.PeerPart`.

    Args:
        reader: reader of this thread.
        segment: the peer's slots.
        memory: where the slots are.
        form: format of the blocks.
        part: part of each block to read, within the segment's shard.
    """

    def __init__(
        self,
        reader: NixlReader,
        segment: Segment,
        memory: NixlMemory,
        form: BlockForm,
        part: BlockShard,
    ) -> None:
        self._reader, self._form, self._part = reader, form, part
        self._metadata, self._base = memory.agent, memory.address
        self._theirs = BlockShard(segment.layers, segment.heads)
        self._slots = segment.slots
        self._peer: bytes | None = None
        self._memory: Tensor | None = None
        self._registered: object = None
        self._answers: Iterator[tuple[bytes, Tensor] | None] = iter(())
        self._stamp_bytes = stamp_type(self._theirs).itemsize
        self._runs = _runs(form, self._theirs, part)

    def request(self, blocks: Sequence[tuple[bytes, int]]) -> None:
        """See `peer.PeerPart`; fetches all blocks."""
        try:
            if self._peer is None:
                self._peer = self._reader.join(self._metadata)
            self._answers = iter(self._fetch(blocks))
        except Exception as error:  # errors of NIXL, about a dead or unknown peer
            self.close()
            raise BadBlock(f"a rank's memory over NIXL: {type(error).__name__} {error}") from None

    def get(self, into: Tensor) -> npt.NDArray[np.int64] | None:
        """See `peer.PeerPart`."""
        answer = next(self._answers)
        if answer is None:
            return None
        stamp, block = answer
        into.copy_(block)
        layers, heads = self._part.within(self._theirs)
        return sums(stamp, self._theirs)[layers, :, heads]

    def close(self) -> None:
        """See `peer.PeerPart`."""
        self._answers = iter(())
        try:
            if self._peer is not None:
                self._reader.leave(self._peer)
            if self._registered is not None:
                self._reader.deregister(self._registered)
        except Exception as error:  # the peer is lost already
            log.info("a peer's agent: %s", error)
        self._peer = self._memory = self._registered = None

    def _fetch(self, blocks: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, Tensor] | None]:
        valid = [i for i, (_, slot) in enumerate(blocks) if 0 <= slot < self._slots]
        slots = np.array([slot for _, slot in blocks], dtype=np.uint64)
        memory = self._reserve(len(valid))
        before = dict(zip(valid, self._stamps(slots[valid], memory), strict=True))
        good = [i for i in valid if before[i].startswith(blocks[i][0])]
        copies = self._blocks(slots[good], memory)
        answers: list[tuple[bytes, Tensor] | None] = [None] * len(blocks)
        for i, block, after in zip(good, copies, self._stamps(slots[good], memory), strict=True):
            if after == before[i]:
                answers[i] = (after, block)
        return answers

    def _reserve(self, count: int) -> Tensor:
        """Registered memory for `count` stamps and, behind the stamps, as many blocks."""
        needed = count * (self._stamp_bytes + self._form.nbytes(self._part))
        if self._memory is None or self._memory.nbytes < needed:
            if self._registered is not None:
                self._reader.deregister(self._registered)
            self._memory = torch.empty(needed, dtype=torch.uint8)
            self._registered = self._reader.register(self._memory)
        return self._memory

    def _stamps(self, slots: Addresses, memory: Tensor) -> list[bytes]:
        """Current stamps of slots."""
        size = self._stamp_bytes
        first = self._base + self._slots * self._form.nbytes(self._theirs)
        addresses = np.uint64(first) + slots * np.uint64(size)
        data = self._read(addresses, np.array([[0, size]], dtype=np.uint64), memory)
        return [stamp.numpy().tobytes() for stamp in data.view(len(slots), size)]

    def _blocks(self, slots: Addresses, memory: Tensor) -> Tensor:
        """The part of each block, [N, l, 2, h, P, D]."""
        addresses = np.uint64(self._base) + slots * np.uint64(self._form.nbytes(self._theirs))
        behind = memory[len(memory) - len(slots) * self._form.nbytes(self._part) :]
        data = self._read(addresses, self._runs, behind)
        return data.view(self._form.dtype).view(len(slots), *self._form.shape(self._part))

    def _read(self, addresses: Addresses, runs: Addresses, memory: Tensor) -> Tensor:
        """Fetch the same ranges behind each address; the results lie one behind the other."""
        sizes = np.tile(runs[:, 1], len(addresses))
        nbytes = int(sizes.sum())
        if nbytes:
            theirs = (addresses[:, None] + runs[:, 0]).reshape(-1)
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
    """Ranges of a part's bytes in a block of `theirs`: [N, 2] of offset and length."""
    (layers, heads), shape = part.within(theirs), form.shape(theirs)
    row, num_heads = form.positions * form.dim * form.dtype.itemsize, shape[2]
    if heads == slice(0, num_heads):
        size = 2 * num_heads * row
        return np.array([[layers.start * size, (layers.stop - layers.start) * size]], np.uint64)
    first = np.arange(2 * layers.start, 2 * layers.stop, dtype=np.uint64) * np.uint64(num_heads)
    offsets = (first + np.uint64(heads.start)) * np.uint64(row)
    return np.stack([offsets, np.full_like(offsets, (heads.stop - heads.start) * row)], axis=1)

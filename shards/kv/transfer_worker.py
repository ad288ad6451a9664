"""A slice's copies between tiers, in a thread for each pool, beside its steps.

The slice's loop hands over moves in the order of the plans; a move that touches the device waits
until what was launched before has run there. Copies towards the device go first, those that only
keep things for later last. Whatever goes wrong with a block is a failed move, which the leader
takes for a miss.

Knows this rank's cache, memory and folders; decides nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from arriero.kernels.ops import KVCache
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.kv import nixl
from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.files import BlockFiles, Folder, LocalFolder, SharedFolder, empty
from arriero.shards.kv.host import HostPool
from arriero.shards.kv.packed_rows import pack, unpack
from arriero.shards.kv.peer import PeerPool
from arriero.shards.kv.tcp import BlockServer
from arriero.shards.kv.transfers import Pool, Segment, Tier, Transfer, TransferBatch, TransferResult

log = logging.getLogger(__name__)

MOST_PEERS = 8
"""Other groups' memories that are kept mapped."""
QUIET_S = 60.0
"""A full disk is told of no more often."""
BATCH = 8
"""Blocks of one copy: few enough that one which matters more does not wait long."""


class Fence(Protocol):
    """A moment in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has passed it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierSettings:
    """What a rank must know to open its tiers.

    Attributes:
        config: which tiers there are.
        salt: of all blocks' keys; names the folder inside the disk's and the store's.
        host_slots: blocks of host memory, the same on every rank.
        rank: of the group.
        pool: whose blocks they are.
        lane: the rank's data-parallel rank.
        piece: what the rank holds of each block.
        host: address at which it serves its host memory to ranks on other nodes.
        writes: False where a rank before it in its lane holds the same piece, and writes the files.
    """

    config: TierConfig
    salt: bytes
    host_slots: int
    rank: int
    pool: Pool
    dp_rank: int
    piece: BlockShard
    host: str
    writes: bool


class TransferWorkers:
    """The tiers of one rank: a mover for each pool that has layers there."""

    def __init__(self, movers: dict[Pool, TransferWorker]) -> None:
        self._movers = movers

    def submit(self, moves: TransferBatch) -> None:
        """Take moves up; from the slice's own thread, in the order of the plans."""
        mover = self._movers.get(moves.pool)
        if mover is not None:
            mover.submit(moves)

    def close(self) -> None:
        """End the threads and give the tiers back; safe to call twice."""
        for mover in self._movers.values():
            mover.close()
        self._movers = {}


class TransferWorker:
    """One pool's tiers of one rank, and the thread that copies.

    Args:
        kv: the device's blocks.
        settings: of the tiers.
        on_moved: told what came of moves, from the thread.
        fence: gives the moment that what was launched so far will have run, or None where a
            launch returns only then.
    """

    def __init__(
        self,
        kv: KVCache,
        settings: TierSettings,
        on_moved: Callable[[TransferResult], None],
        fence: Callable[[], Fence | None] = lambda: None,
    ) -> None:
        self._kv, self._settings, self._on_moved, self._fence = kv, settings, on_moved, fence
        self._row_type = settings.config.dtype
        self._form = BlockForm.of(kv.spec, packed=self._row_type is not None)
        self._on_cuda = kv.read(0, [0]).is_cuda
        self._piece = settings.piece
        self._layers = range(self._piece.layers[1] - self._piece.layers[0])
        self._queue: queue.PriorityQueue[tuple[int, int, _Work | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._host: HostPool | None = None
        self._server: BlockServer | None = None
        self._nixl_server: nixl.NixlServer | None = None
        self._nixl: nixl.NixlReader | None = None
        self._files: dict[Tier, BlockFiles] = {}
        self._peers: dict[tuple[Segment, ...], PeerPool] = {}
        self._cuda_stream: Any = None
        self._quiet_until_s = 0.0
        self._thread = threading.Thread(target=self._run, name="kv-mover", daemon=True)
        self._thread.start()

    def submit(self, moves: TransferBatch) -> None:
        """Take moves up; from the slice's own thread, in the order of the plans."""
        fence = self._fence()
        for tier, key in moves.dropped:  # before any later write of the same key
            self._put(1, _Work([], dropped=(tier, key)))
        kinds: dict[tuple[Tier, Tier], list[Transfer]] = {}
        for move in moves.moves:
            kinds.setdefault((move.source, move.target), []).append(move)
        for (source, target), several in kinds.items():
            urgency = 0 if target is Tier.DEVICE else 1 if source is Tier.DEVICE else 2
            for start in range(0, len(several), BATCH):
                batch = several[start : start + BATCH]
                self._put(urgency, _Work(batch, fence=fence, peer=moves.peer))

    def close(self) -> None:
        """End the thread and give the tiers back; moves not yet made are left."""
        self._put(-1, None)
        self._thread.join()

    def _put(self, urgency: int, work: _Work | None) -> None:
        self._queue.put((urgency, next(self._order), work))

    # ---- the thread ----

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        self._on_moved(self._open())
        with self._device_work():
            while (work := self._queue.get()[2]) is not None:
                said = self._do(work)
                if said is not None:
                    self._on_moved(said)
        for peer in self._peers.values():
            peer.close()
        for server in (self._server, self._nixl_server):
            if server is not None:
                server.close()
        if self._host is not None:
            self._host.close()

    def _device_work(self) -> Any:  # noqa: ANN401
        """The thread's own stream, where there are streams."""
        if not self._on_cuda:
            return nullcontext()
        self._cuda_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._cuda_stream)

    def _open(self) -> TransferResult:
        """Open the tiers; what they hold already is the rank's first word."""
        settings, config = self._settings, self._settings.config
        first = TransferResult(settings.rank, settings.pool, ready=True, dp_rank=settings.dp_rank)
        if settings.host_slots:
            try:
                self._host = HostPool(
                    self._form, self._piece, settings.host_slots, pinned=self._on_cuda
                )
                self._server = BlockServer(self._host, settings.host)
                first.segment = replace(
                    self._host.segment,
                    address=self._server.address,
                    token=self._server.token,
                    nixl=self._open_nixl(self._host),
                )
            except OSError as error:
                log.error("no host memory for KV blocks: %s", error)
        folders: dict[Tier, Callable[[], Folder]] = {}
        folder = hashlib.blake2b(settings.salt, digest_size=8).hexdigest()
        folder = f"{folder}/{settings.pool.name.lower()}"
        if config.disk_path is not None:
            folders[Tier.DISK] = lambda: LocalFolder(f"{config.disk_path}/{folder}")
        if config.shared_url is not None:
            folders[Tier.SHARED] = lambda: SharedFolder(f"{config.shared_url}/{folder}")
        for tier, make in folders.items():
            try:
                files = BlockFiles(make(), self._form, self._piece, writes=settings.writes)
                first.found[tier] = files.scan()
                self._files[tier] = files
            except Exception as error:  # a store's own kinds of error are without end
                log.error("the tier %s of KV blocks cannot be used: %s", tier.name, error)
        return first

    def _open_nixl(self, host: HostPool) -> bytes:
        """Read and be read through NIXL if that is the way; what readers must know then."""
        if not nixl.wanted(self._settings.config.transfer):
            return b""
        try:
            self._nixl_server = nixl.NixlServer(host)
            self._nixl = nixl.NixlReader()
        except Exception as error:  # NIXL's own kinds, of drivers and cards
            log.warning("KV blocks travel over TCP: NIXL cannot be used here: %s", error)
            return b""
        return self._nixl_server.told

    def _do(self, work: _Work) -> TransferResult | None:
        """Do a piece of work, whatever it meets; gives what is to be told of it."""
        failed: set[int] = set()
        try:
            if work.dropped is not None:
                tier, key = work.dropped
                if tier in self._files:
                    self._files[tier].drop(key)
            else:
                failed = self._copy(work)
        except Exception as error:  # a store's own kinds of error are without end
            log.warning("KV blocks could not be moved: %s", error)
            failed = {move.id for move in work.moves}
        if not work.moves:
            return None
        said = TransferResult(
            self._settings.rank, self._settings.pool, dp_rank=self._settings.dp_rank
        )
        for move in work.moves:
            (said.failed if move.id in failed else said.done).append(move.id)
        return said

    def _copy(self, work: _Work) -> set[int]:
        """Make the moves of a batch, which are of one kind; gives the ids that failed."""
        moves, source, target = work.moves, work.moves[0].source, work.moves[0].target
        if Tier.DEVICE in (source, target) and work.fence is not None:
            work.fence.synchronize()
        failed: set[int] = set()
        if source is Tier.DEVICE:
            data = self._from_device([move.source_at for move in moves])
        else:
            data = empty(self._form, self._piece, len(moves))
            if source is Tier.PEER:
                lost = self._peer(work.peer).copy([(m.key, m.source_at) for m in moves], data)
                failed = {moves[i].id for i in lost}
            else:
                failed = self._read(source, moves, data)
        good = [i for i, move in enumerate(moves) if move.id not in failed]
        if not good:
            return failed
        chosen = [moves[i] for i in good]
        part = data if len(good) == len(moves) else data[good]
        if target is Tier.DEVICE:
            self._to_device([move.target_at for move in chosen], part)
        elif target is Tier.HOST:
            self._to_host(chosen, part)
        else:
            failed |= self._to_files(target, chosen, part)
        return failed

    def _from_device(self, blocks: Sequence[int]) -> Tensor:
        data = empty(self._form, self._piece, len(blocks))
        for layer in self._layers:
            rows = self._kv.read(layer, blocks)
            data[:, layer].copy_(rows if self._row_type is None else pack(rows, self._row_type))
        return data

    def _to_device(self, blocks: Sequence[int], data: Tensor) -> None:
        for layer in self._layers:
            rows = data[:, layer]
            if self._row_type is not None:
                rows = unpack(rows, self._row_type)
            self._kv.write(layer, blocks, rows)
        if self._cuda_stream is not None:
            self._cuda_stream.synchronize()

    def _to_host(self, moves: Sequence[Transfer], data: Tensor) -> None:
        assert self._host is not None, "no host memory"
        self._host.put([move.target_at for move in moves], [move.key for move in moves], data)

    def _to_files(self, tier: Tier, moves: Sequence[Transfer], data: Tensor) -> set[int]:
        failed = set()
        for move, block in zip(moves, data, strict=True):
            try:
                self._files[tier].put(move.key, block)
            except Exception as error:  # disk full, store away: the block is merely not kept
                failed.add(move.id)
                if time.monotonic() >= self._quiet_until_s:
                    self._quiet_until_s = time.monotonic() + QUIET_S
                    log.warning("KV blocks are not kept in tier %s: %s", tier.name, error)
        return failed

    def _read(self, tier: Tier, moves: Sequence[Transfer], data: Tensor) -> set[int]:
        """Fill blocks from a tier of ours; gives the ids of those that are not right there."""
        failed = set()
        for move, into in zip(moves, data, strict=True):
            try:
                if tier is Tier.HOST:
                    assert self._host is not None, "no host memory"
                    self._host.get(move.key, move.source_at, into)
                else:
                    self._files[tier].get(move.key, into)
            except BadBlock as error:
                log.info("block %s: %s", move.key.hex(), error)
                failed.add(move.id)
        return failed

    def _peer(self, segments: tuple[Segment, ...]) -> PeerPool:
        """A peer's memory; the ones used before are kept at hand."""
        if segments not in self._peers:
            while len(self._peers) >= MOST_PEERS:
                self._peers.pop(next(iter(self._peers))).close()
            self._peers[segments] = PeerPool(segments, self._form, self._piece, self._nixl)
        return self._peers[segments]


@dataclass(slots=True)
class _Work:
    """A batch of moves of one kind, or a file to be dropped."""

    moves: list[Transfer]
    fence: Fence | None = None
    peer: tuple[Segment, ...] = ()
    dropped: tuple[Tier, bytes] | None = None

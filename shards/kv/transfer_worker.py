"""A slice's transfers of blocks between tiers, in a thread for each pool, beside its steps.

The slice's loop submits transfers in the order of the plans. A transfer that touches the device
waits until all earlier launches have run there. Transfers to the device go first, transfers between
lower tiers last. Any error with a block is a failed transfer, which the leader treats as a miss.

Knows this rank's cache, memory and folders; decides nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from arriero.kernels.kv_cache import KVCache
from arriero.shards.config.kv_tiers import TierConfig
from arriero.shards.kv import nixl
from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard
from arriero.shards.kv.device_blocks import DeviceBlocks
from arriero.shards.kv.files import BlockFiles, Folder, LocalFolder, SharedFolder, empty
from arriero.shards.kv.host import HostPool
from arriero.shards.kv.peer import PeerPool
from arriero.shards.kv.tcp import BlockServer
from arriero.shards.kv.transfers import (
    NixlMemory,
    Pool,
    Segment,
    Tier,
    Transfer,
    TransferBatch,
    TransferResult,
)

log = logging.getLogger(__name__)

MOST_PEERS = 8
"""Most peer groups whose memory stays mapped."""
QUIET_S = 60.0
"""Seconds between two warnings about a full disk."""
BATCH = 8
"""Blocks of one copy: few enough that an urgent copy does not wait long."""


class Fence(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has passed the point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierSettings:
    """Settings of one rank's tiers below one pool.

    Attributes:
        config: configured tiers.
        salt: salt of all blocks' keys; names the folder on disk and in the shared store.
        host_slots: blocks of host memory, the same on every rank.
        rank: rank in the group.
        pool: pool of the blocks.
        dp_rank: data-parallel rank of the rank.
        shard: the rank's shard of each block.
        host: address of the server of host memory for ranks on other nodes.
        writes: False if an earlier rank of the data-parallel rank has the same shard and writes
            the files.
    """

    config: TierConfig
    salt: bytes
    host_slots: int
    rank: int
    pool: Pool
    dp_rank: int
    shard: BlockShard
    host: str
    writes: bool


class TransferWorkers:
    """Transfer workers of one rank: one for each pool that has layers on the rank."""

    def __init__(self, workers: dict[Pool, TransferWorker]) -> None:
        self._workers = workers

    def submit(self, batch: TransferBatch) -> None:
        """Start transfers; call from the slice's own thread, in the order of the plans."""
        worker = self._workers.get(batch.pool)
        if worker is not None:
            worker.submit(batch)

    def rebind(self, pools: Mapping[Pool, KVCache] | None) -> None:
        """Use other caches of the same form from now on; None: no transfer follows until then.

        Call while no transfer is in flight.
        """
        for pool, worker in self._workers.items():
            worker.rebind(None if pools is None else pools[pool])

    def close(self) -> None:
        """End the threads and close the tiers; safe to call twice."""
        for worker in self._workers.values():
            worker.close()
        self._workers = {}


class TransferWorker:
    """Tiers of one rank below one pool, and the thread that makes the transfers.

    Args:
        kv: blocks on the device.
        settings: settings of the tiers.
        on_result: callback with transfer results, from the thread.
        fence: returns a point behind all launches so far, or None on devices where a launch
            returns only after the work.
    """

    def __init__(
        self,
        kv: KVCache,
        settings: TierSettings,
        on_result: Callable[[TransferResult], None],
        fence: Callable[[], Fence | None] = lambda: None,
    ) -> None:
        self._settings, self._on_result, self._fence = settings, on_result, fence
        self._row_type = settings.config.dtype
        self._form = BlockForm.of(kv.spec, packed=self._row_type is not None)
        self._shard = settings.shard
        self._device_blocks = DeviceBlocks(kv, self._form, self._shard, self._row_type, BATCH)
        self._queue: queue.PriorityQueue[tuple[int, int, _Work | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._host: HostPool | None = None
        self._server: BlockServer | None = None
        self._nixl_server: nixl.NixlServer | None = None
        self._nixl: nixl.NixlReader | None = None
        self._files: dict[Tier, BlockFiles] = {}
        self._peers: dict[tuple[Segment, ...], PeerPool] = {}
        self._quiet_until_s = 0.0
        self._thread = threading.Thread(target=self._run, name="kv-transfers", daemon=True)
        self._thread.start()

    def submit(self, batch: TransferBatch) -> None:
        """Start transfers; call from the slice's own thread, in the order of the plans."""
        fence = self._fence()
        for tier, key in batch.dropped:  # before any later write of the same key
            self._put(1, _Work([], dropped=(tier, key)))
        kinds: dict[tuple[Tier, Tier], list[Transfer]] = {}
        for transfer in batch.transfers:
            kinds.setdefault((transfer.source, transfer.target), []).append(transfer)
        for (source, target), transfers in kinds.items():
            urgency = 0 if target is Tier.DEVICE else 1 if source is Tier.DEVICE else 2
            for start in range(0, len(transfers), BATCH):
                work = _Work(transfers[start : start + BATCH], fence=fence, peer=batch.peer)
                self._put(urgency, work)

    def rebind(self, kv: KVCache | None) -> None:
        """Use another cache of the same form from now on; see `TransferWorkers.rebind`."""
        self._device_blocks.rebind(kv)

    def close(self) -> None:
        """End the thread and close the tiers; waiting transfers are dropped."""
        self._put(-1, None)
        self._thread.join()

    def _put(self, urgency: int, work: _Work | None) -> None:
        self._queue.put((urgency, next(self._order), work))

    # ---- the thread ----

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        self._on_result(self._open())
        with self._device_work():
            while (work := self._queue.get()[2]) is not None:
                result = self._do(work)
                if result is not None:
                    self._on_result(result)
        for peer in self._peers.values():
            peer.close()
        for server in (self._server, self._nixl_server):
            if server is not None:
                server.close()
        if self._host is not None:
            self._host.close()

    def _device_work(self) -> AbstractContextManager[object]:
        """Context of the thread's own CUDA stream, if any."""
        if not self._device_blocks.on_cuda:
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def _open(self) -> TransferResult:
        """Open the tiers; returns the rank's first result, with the keys in each tier."""
        settings, config = self._settings, self._settings.config
        result = TransferResult(settings.rank, settings.pool, ready=True, dp_rank=settings.dp_rank)
        if settings.host_slots:
            try:
                self._host = HostPool(
                    self._form, self._shard, settings.host_slots, pinned=self._device_blocks.on_cuda
                )
                self._server = BlockServer(self._host, settings.host)
                result.segment = replace(
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
                files = BlockFiles(make(), self._form, self._shard, writes=settings.writes)
                result.stored[tier] = files.scan()
                self._files[tier] = files
            except Exception as error:  # each store has errors of its own
                log.error("the tier %s of KV blocks cannot be used: %s", tier.name, error)
        return result

    def _open_nixl(self, host: HostPool) -> NixlMemory | None:
        """Open NIXL for reading and serving, if enabled; returns the memory for readers."""
        if not nixl.enabled(self._settings.config.transfer):
            return None
        try:
            self._nixl_server = nixl.NixlServer(host)
            self._nixl = nixl.NixlReader()
        except Exception as error:  # errors of NIXL, drivers and cards
            log.warning("KV blocks travel over TCP: NIXL cannot be used here: %s", error)
            return None
        return self._nixl_server.memory

    def _do(self, work: _Work) -> TransferResult | None:
        """Do a unit of work, whatever happens; returns the result of its transfers."""
        failed: set[int] = set()
        try:
            if work.dropped is not None:
                tier, key = work.dropped
                if tier in self._files:
                    self._files[tier].drop(key)
            else:
                failed = self._copy(work)
        except Exception as error:  # each store has errors of its own
            log.warning("KV blocks could not be transferred: %s", error)
            failed = {transfer.id for transfer in work.transfers}
        if not work.transfers:
            return None
        result = TransferResult(
            self._settings.rank, self._settings.pool, dp_rank=self._settings.dp_rank
        )
        for transfer in work.transfers:
            (result.failed if transfer.id in failed else result.done).append(transfer.id)
        return result

    def _copy(self, work: _Work) -> set[int]:
        """Make transfers of one source and target; returns the ids of failed transfers."""
        transfers = work.transfers
        source, target = transfers[0].source, transfers[0].target
        if Tier.DEVICE in (source, target) and work.fence is not None:
            work.fence.synchronize()
        failed: set[int] = set()
        if source is Tier.DEVICE:
            data = self._device_blocks.read([transfer.source_index for transfer in transfers])
        else:
            data = empty(self._form, self._shard, len(transfers))
            if source is Tier.PEER:
                refs = [(t.key, t.source_index) for t in transfers]
                lost = self._peer(work.peer).copy(refs, data)
                failed = {transfers[i].id for i in lost}
            else:
                failed = self._read(source, transfers, data)
        good = [i for i, transfer in enumerate(transfers) if transfer.id not in failed]
        if not good:
            return failed
        chosen = [transfers[i] for i in good]
        blocks = data if len(good) == len(transfers) else data[good]
        if target is Tier.DEVICE:
            self._device_blocks.write([t.target_index for t in chosen], blocks)
        elif target is Tier.HOST:
            self._to_host(chosen, blocks)
        else:
            failed |= self._to_files(target, chosen, blocks)
        return failed

    def _to_host(self, transfers: Sequence[Transfer], data: Tensor) -> None:
        assert self._host is not None, "no host memory"
        self._host.put([t.target_index for t in transfers], [t.key for t in transfers], data)

    def _to_files(self, tier: Tier, transfers: Sequence[Transfer], data: Tensor) -> set[int]:
        failed = set()
        for transfer, block in zip(transfers, data, strict=True):
            try:
                self._files[tier].put(transfer.key, block)
            except Exception as error:  # disk full, store unavailable: the block is not stored
                failed.add(transfer.id)
                if time.monotonic() >= self._quiet_until_s:
                    self._quiet_until_s = time.monotonic() + QUIET_S
                log.warning("KV blocks are not stored in tier %s: %s", tier.name, error)
        return failed

    def _read(self, tier: Tier, transfers: Sequence[Transfer], data: Tensor) -> set[int]:
        """Fill blocks from the rank's own tier; returns the ids of failed transfers."""
        failed = set()
        for transfer, into in zip(transfers, data, strict=True):
            try:
                if tier is Tier.HOST:
                    assert self._host is not None, "no host memory"
                    self._host.get(transfer.key, transfer.source_index, into)
                else:
                    self._files[tier].get(transfer.key, into)
            except BadBlock as error:
                log.info("block %s: %s", transfer.key.hex(), error)
                failed.add(transfer.id)
        return failed

    def _peer(self, segments: tuple[Segment, ...]) -> PeerPool:
        """Memory of a peer; recently used memory stays mapped."""
        if segments not in self._peers:
            while len(self._peers) >= MOST_PEERS:
                self._peers.pop(next(iter(self._peers))).close()
            self._peers[segments] = PeerPool(segments, self._form, self._shard, self._nixl)
        return self._peers[segments]


@dataclass(slots=True)
class _Work:
    """Transfers of one source and target, or a file to remove."""

    transfers: list[Transfer]
    fence: Fence | None = None
    peer: tuple[Segment, ...] = ()
    dropped: tuple[Tier, bytes] | None = None

"""A scheduler's cache, as tiers, operators and other groups call it.

Knows blocks; knows nothing of plans.
"""

from __future__ import annotations

from arriero.shards.engine.admission import Admission
from arriero.shards.engine.cache_report import CacheReport, report_of
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.waiting import WaitingQueue
from arriero.shards.kv.limits import PeerBlocks
from arriero.shards.kv.transfers import Pool, TransferBatch, TransferResult


class CacheCalls:
    """Calls on the blocks of a scheduler, which sets the attributes."""

    _blocks: SequenceBlocks
    _waiting: WaitingQueue
    _admission: Admission

    @property
    def num_transfers(self) -> int:
        """Transfers of blocks in flight or waiting."""
        return self._blocks.tiers.num_transfers

    def take_transfers(self) -> list[TransferBatch]:
        """Transfers of blocks, to be sent after all plans so far."""
        return self._blocks.tiers.take_transfers()

    def apply_results(self, results: list[TransferResult]) -> None:
        """Apply transfer results, maybe none."""
        for result in results:
            self._blocks.tiers.apply(result)
        self._waiting.finish_loads()

    def cache(self) -> CacheReport:
        """Contents of the KV cache by tier and tenant."""
        return report_of(self._blocks, dict(self._admission.by_tenant))

    def pin(self, name: str, tokens: tuple[int, ...]) -> int:
        """Keep a prefix on the device, as far as it is there; see `SequenceBlocks.pin`."""
        return self._blocks.pin(name, tokens)

    def unpin(self, name: str) -> bool:
        """Remove a pin; False without a pin of this name."""
        return self._blocks.unpin(name)

    def release(self, tenant: str, session: str) -> None:
        """Retain the blocks of a tenant's session no longer."""
        self._blocks.release(tenant, session)

    def is_saving(self, keys: list[bytes]) -> bool:
        """Whether a transfer of any of these blocks to host memory is in flight; thread-safe."""
        return self._blocks.tiers.is_saving(keys)

    def shared(self, keys: list[bytes]) -> dict[Pool, PeerBlocks]:
        """Blocks of these keys that another group may copy, by pool; thread-safe."""
        return self._blocks.tiers.shared(keys)

    def flush(self) -> int:
        """Drop every unused block, on the device and below; returns the number of blocks."""
        return self._blocks.flush()

    def empty_cache(self) -> None:
        """Drop every cached block and pin; no sequence is in a slot."""
        self._blocks.empty()

    def set_salt(self, salt: bytes) -> None:
        """Begin the keys of all blocks with another salt: of other weights."""
        self._blocks.set_salt(salt)

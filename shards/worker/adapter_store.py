"""A rank's adapters in host memory: read in a thread beside the steps, copied into slots by plans.

The leader decides on reads, drops and slots. An adapter that cannot be read, or with other files
than the leader knows, is a result with an error. Knows this rank's banks; decides nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence

from arriero.shards.adapters.adapter import Adapter
from arriero.shards.adapters.banks import AdapterBanks, AdapterCut
from arriero.shards.adapters.reader import AdapterReader
from arriero.shards.adapters.root import signature
from arriero.shards.config.group import GroupConfig
from arriero.shards.errors import CheckpointError
from arriero.shards.layout.parts import AnyModel
from arriero.shards.protocol.adapters import AdapterBatch, AdapterLoad, AdapterResult, SlotChange

log = logging.getLogger(__name__)


class AdapterStore:
    """Adapters of a rank.

    Args:
        banks: slots of the rank.
        reader: opens adapters.
        rank: rank in the group.
        dp_rank: data-parallel rank.
        pinned: whether host memory is page-locked.
    """

    def __init__(
        self,
        banks: AdapterBanks,
        reader: AdapterReader,
        *,
        rank: int,
        dp_rank: int,
        pinned: bool,
    ) -> None:
        self._banks: AdapterBanks | None = banks
        self._reader = reader
        self._rank, self._dp_rank, self._pinned = rank, dp_rank, pinned
        self._cuts: dict[str, AdapterCut] = {}
        self._in_slots: dict[int, str] = {}  # digest by slot
        self._loads: queue.SimpleQueue[AdapterLoad | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, on_result: Callable[[AdapterResult], None]) -> None:
        """Start the thread of loads; `on_result` is called there with the end of each load."""
        self._thread = threading.Thread(
            target=self._run, args=(on_result,), name="adapters", daemon=True
        )
        self._thread.start()

    def submit(self, batch: AdapterBatch) -> None:
        """Drop adapters, and queue loads."""
        for digest in batch.dropped:
            self._cuts.pop(digest, None)
        for load in batch.loads:
            self._loads.put(load)

    def apply(self, changes: Iterable[SlotChange]) -> None:
        """Copy adapters into slots, in the order of the device's work."""
        for change in changes:
            self._bound.write(change.slot, self._cuts[change.digest])
            self._in_slots[change.slot] = change.digest

    def rebind(self, banks: AdapterBanks | None) -> None:
        """Use other slots of the same size from now on, with the same adapters in them.

        Args:
            banks: empty slots; None: no adapter enters a slot until the next call.
        """
        self._banks = banks
        for slot, digest in self._in_slots.items() if banks is not None else ():
            if digest in self._cuts:  # otherwise its sequences and the adapter have ended
                self._bound.write(slot, self._cuts[digest])

    @property
    def _bound(self) -> AdapterBanks:
        assert self._banks is not None, "the leader changes no slot without weights"
        return self._banks

    def close(self) -> None:
        """Stop the thread."""
        self._loads.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, on_result: Callable[[AdapterResult], None]) -> None:
        while (load := self._loads.get()) is not None:
            error = ""
            try:
                self._cuts[load.digest] = self._read(load)
            except CheckpointError as failure:
                error = str(failure)
            except Exception as failure:  # requests of this adapter fail; the others go on
                log.exception("the adapter in %s cannot be loaded", load.path)
                error = f"{load.path}: {type(failure).__name__}: {failure}"
            on_result(
                AdapterResult(
                    rank=self._rank, digest=load.digest, error=error[:2000], dp_rank=self._dp_rank
                )
            )

    def _read(self, load: AdapterLoad) -> AdapterCut:
        before = signature(load.path)
        adapter = self._reader.open(load.path)
        if adapter.digest != load.digest:
            raise CheckpointError(
                f"{load.path}: the files have changed since the adapter was added; add it again"
            )
        cut = self._bound.cut(adapter, pinned=self._pinned)
        if signature(load.path) != before:
            raise CheckpointError(f"{load.path}: the files changed while they were read; try again")
        return cut


def store_of(
    config: GroupConfig,
    model: AnyModel,
    listed: Sequence[Adapter],
    banks: AdapterBanks | None,
    rank: int,
) -> AdapterStore | None:
    """The store of a rank; None in a group whose slots do not change.

    Args:
        config: resolved config of the group.
        model: config of the model.
        listed: the listed adapters.
        banks: slots of the rank.
        rank: rank in the group.

    Raises:
        CheckpointError: a listed adapter does not fit the slots.
    """
    if config.adapter_slots is None or banks is None:
        return None
    return AdapterStore(
        banks,
        AdapterReader(config.adapter_slots, model, listed, config.model_path),
        rank=rank,
        dp_rank=config.dp_rank_of(rank),
        pinned=config.device == "cuda",
    )

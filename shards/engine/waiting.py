"""Sequences that wait for a slot, by rank; some first wait for blocks of a lower tier.

A sequence that waits for blocks does not delay others: sequences behind may go first. When a tier
stops responding, its sequences stop waiting and compute the missing blocks.

Knows ranks, loads and time; knows nothing of slots or plans.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from operator import attrgetter

from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.kv.tiers import PrefixLoad

LOADS_AHEAD = 8
"""Sequences at the head of the queue whose prefixes are loaded before their turn."""
PATIENCE_S = 5.0
"""Seconds without the end of any transfer after which loads are abandoned."""

_rank = attrgetter("rank")


class WaitingQueue:
    """The queue of waiting sequences.

    Args:
        blocks: blocks and tiers of sequences.
        clock: monotonic time in seconds.
    """

    def __init__(self, blocks: SequenceBlocks, clock: Callable[[], float]) -> None:
        self._blocks, self._clock = blocks, clock
        self._ready: list[Sequence] = []  # by rank
        self._loading: dict[int, tuple[Sequence, PrefixLoad]] = {}  # by the sequence's owner
        self._abandoned: list[PrefixLoad] = []
        self._progress = (0, 0.0)  # number of transfer results, and time of the last increase

    def __len__(self) -> int:
        return len(self._ready) + len(self._loading)

    def ready(self, place: int) -> Sequence | None:
        """The sequence at a place among those that need no blocks of a lower tier; None behind."""
        return self._ready[place] if place < len(self._ready) else None

    def adapters(self, most: int) -> list[str]:
        """Adapters of the first `most` sequences, in order of precedence."""
        return [sequence.adapter for sequence in self._ready[:most] if sequence.adapter]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its rank."""
        sequence.searched = False
        insort(self._ready, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue, loading or ready."""
        loading = self._loading.pop(sequence.owner, None)
        if loading is not None:
            self._abandoned.append(loading[1])  # blocks stay pinned until the transfers end
        else:
            del self._ready[bisect_left(self._ready, sequence.rank, key=_rank)]

    def start_loads(self, spare: int) -> None:
        """Start loading prefixes from lower tiers, with `spare` blocks of each pool left over."""
        if not self._blocks.tiers.enabled:
            return
        for sequence in self._ready[:LOADS_AHEAD]:
            if not sequence.searched:
                sequence.searched = True
                load = self._blocks.begin_load(sequence, spare)
                if load is not None:
                    self._ready.remove(sequence)
                    self._loading[sequence.owner] = (sequence, load)

    def finish_loads(self) -> None:
        """Make sequences ready whose blocks have arrived, or will not arrive in time."""
        if not self._loading and not self._abandoned:
            return
        now, num_results = self._clock(), self._blocks.tiers.num_results
        if num_results != self._progress[0] or not self._loading:
            self._progress = (num_results, now)
        stalled = now - self._progress[1] > PATIENCE_S
        for sequence, load in list(self._loading.values()):
            if not load.num_left or stalled:
                del self._loading[sequence.owner]
                insort(self._ready, sequence, key=_rank)
                if load.num_left:
                    self._abandoned.append(load)
                else:
                    self._blocks.end_load(load, sequence)
        for load in [load for load in self._abandoned if not load.num_left]:
            self._abandoned.remove(load)
            self._blocks.end_load(load, None)

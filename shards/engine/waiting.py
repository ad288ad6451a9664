"""Sequences that wait for a slot, by rank; some of them for blocks from a lower tier first.

Whoever waits for blocks holds up nobody: those behind may go first. A tier that gives no sign of
life loses its waiters, who compute what they waited for.

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
"""The first so many have their prefixes brought up before their turn."""
PATIENCE_S = 5.0
"""Loads are waited for while any copy has ended within this time."""

_rank = attrgetter("rank")


class Waiting:
    """The queue.

    Args:
        blocks: of sequences, and their tiers.
        clock: seconds, monotonic.
    """

    def __init__(self, blocks: SequenceBlocks, clock: Callable[[], float]) -> None:
        self._blocks, self._clock = blocks, clock
        self._ready: list[Sequence] = []  # by rank
        self._loading: dict[int, tuple[Sequence, PrefixLoad]] = {}  # by the sequence's owner
        self._abandoned: list[PrefixLoad] = []
        self._heard = (0, 0.0)  # answers of tiers, and when there were that many first

    def __len__(self) -> int:
        return len(self._ready) + len(self._loading)

    @property
    def first(self) -> Sequence | None:
        """Who goes first of those that can."""
        return self._ready[0] if self._ready else None

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence by its rank."""
        sequence.searched = False
        insort(self._ready, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, from wherever in the queue it is."""
        loading = self._loading.pop(sequence.owner, None)
        if loading is not None:
            self._abandoned.append(loading[1])  # the blocks are pinned until the copies end
        else:
            del self._ready[bisect_left(self._ready, sequence.rank, key=_rank)]

    def start_loads(self, spare: int) -> None:
        """Have prefixes brought up from lower tiers, `spare` blocks of each pool left over."""
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
        """Let go on whose blocks have come, or will not come in time."""
        if not self._loading and not self._abandoned:
            return
        now, answers = self._clock(), self._blocks.tiers.num_answers
        if answers != self._heard[0] or not self._loading:
            self._heard = (answers, now)
        stalled = now - self._heard[1] > PATIENCE_S
        for sequence, load in list(self._loading.values()):
            if not load.left or stalled:
                del self._loading[sequence.owner]
                insort(self._ready, sequence, key=_rank)
                if load.left:
                    self._abandoned.append(load)
                else:
                    self._blocks.end_load(load, sequence)
        for load in [one for one in self._abandoned if not one.left]:
            self._abandoned.remove(load)
            self._blocks.end_load(load, None)

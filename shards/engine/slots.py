"""Numbers of the sequences in slots, an array a field, so that a decode step loops over none.

Knows what a slot's numbers mean; knows nothing of what is scheduled next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.shards.engine.sequence import Sequence


class SlotTable:
    """Slots 0 .. size - 1 and, for each, what a decode step reads and writes.

    `scheduled` runs ahead of `known`: while it is the larger or equal, a sample is in flight.

    Attributes:
        sequences: object [size]; the sequence in each slot, or None.
        generation: counts the occupants of a slot; a result for an earlier one is discarded.
        known: tokens known, prompt and output.
        scheduled: positions that are computed or in flight.
        capacity: tokens that the slot's blocks hold.
        limit: `known` at which the sequence ends.
        min_known: stops count only for tokens beyond so many.
        heeds_eos: the model's own end tokens stop it.
        own_stops: it has stop tokens of its own.
        reports: its outputs hold more than a token (the first one; log-probabilities).
        passed: how many chunks, or blocks of a window, the slot had passed when what it can no
            longer see was given back last.
        last_token: the token known last.
        last_step: the step that took it up last.
    """

    def __init__(self, size: int) -> None:
        self.sequences: npt.NDArray[Any] = np.full(size, None, dtype=object)
        self.generation = np.zeros(size, dtype=np.int64)
        self.known = np.zeros(size, dtype=np.int32)
        self.scheduled = np.zeros(size, dtype=np.int32)
        self.capacity = np.zeros(size, dtype=np.int32)
        self.limit = np.zeros(size, dtype=np.int32)
        self.min_known = np.zeros(size, dtype=np.int32)
        self.heeds_eos = np.zeros(size, dtype=np.bool_)
        self.own_stops = np.zeros(size, dtype=np.bool_)
        self.reports = np.zeros(size, dtype=np.bool_)
        self.passed = np.zeros(size, dtype=np.int32)
        self.last_token = np.zeros(size, dtype=np.int32)
        self.last_step = np.zeros(size, dtype=np.int64)
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Slots that nobody is in."""
        return len(self._free)

    def enter(self, sequence: Sequence, *, scheduled: int, capacity: int) -> int:
        """Put a sequence into a free slot, with `scheduled` positions found computed."""
        slot = sequence.slot = self._free.pop()
        params = sequence.live.params
        self.sequences[slot] = sequence
        self.known[slot] = len(sequence.tokens)
        self.scheduled[slot] = scheduled
        self.capacity[slot] = capacity
        self.limit[slot] = sequence.limit
        self.min_known[slot] = min(sequence.num_prompt + params.min_tokens, sequence.limit)
        self.heeds_eos[slot] = not params.ignore_eos
        self.own_stops[slot] = bool(sequence.live.stop_tokens)
        self.reports[slot] = not sequence.started or params.logprobs is not None
        self.passed[slot] = -1
        self.last_step[slot] = -1
        return slot

    def leave(self, sequence: Sequence) -> None:
        """Empty a sequence's slot; samples still in flight for it are void."""
        slot, sequence.slot = sequence.slot, -1
        self.sequences[slot] = None
        self.generation[slot] += 1
        self._free.append(slot)

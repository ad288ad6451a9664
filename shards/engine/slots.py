"""Arrays of per-slot numbers, so that a decode step needs no loop over sequences.

Knows the meaning of a slot's numbers; knows nothing of what is scheduled next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.shards.engine.sequence import Sequence


class SlotTable:
    """Slots 0 .. size - 1 with the numbers that a decode step reads and writes.

    `scheduled` runs ahead of `known`: while `scheduled` >= `known`, a sample is in flight.

    Attributes:
        sequences: object [size]; the sequence in each slot, or None.
        generation: count of sequences in the slot so far; older results are discarded.
        known: known tokens, prompt and output.
        scheduled: positions that are computed or in flight.
        capacity: tokens that fit the slot's blocks.
        limit: `known` at which the sequence ends.
        min_known: number of tokens after which stops count.
        stops_at_eos: whether the model's end tokens stop the sequence.
        own_stops: whether the request has stop tokens of its own.
        reports: whether outputs have more than a token (the first output; log-probabilities).
        passed: chunks, or blocks of a window, passed when out-of-sight blocks were last freed.
        last_token: last known token.
        waits: whether the next step needs all tokens known, since it is to have drafted tokens.
        last_step: last step with this slot.
        background: whether the sequence runs on what interactive requests leave free.
    """

    def __init__(self, size: int) -> None:
        self.sequences: npt.NDArray[Any] = np.full(size, None, dtype=object)
        self.generation = np.zeros(size, dtype=np.int64)
        self.known = np.zeros(size, dtype=np.int32)
        self.scheduled = np.zeros(size, dtype=np.int32)
        self.capacity = np.zeros(size, dtype=np.int32)
        self.limit = np.zeros(size, dtype=np.int32)
        self.min_known = np.zeros(size, dtype=np.int32)
        self.stops_at_eos = np.zeros(size, dtype=np.bool_)
        self.own_stops = np.zeros(size, dtype=np.bool_)
        self.reports = np.zeros(size, dtype=np.bool_)
        self.passed = np.zeros(size, dtype=np.int32)
        self.last_token = np.zeros(size, dtype=np.int32)
        self.last_step = np.zeros(size, dtype=np.int64)
        self.waits = np.zeros(size, dtype=np.bool_)
        self.background = np.zeros(size, dtype=np.bool_)
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Empty slots."""
        return len(self._free)

    def enter(self, sequence: Sequence, *, scheduled: int, capacity: int) -> int:
        """Put a sequence into a free slot, with `scheduled` positions already computed."""
        slot = sequence.slot = self._free.pop()
        params = sequence.live.params
        self.sequences[slot] = sequence
        self.known[slot] = len(sequence.tokens)
        self.scheduled[slot] = scheduled
        self.capacity[slot] = capacity
        self.limit[slot] = sequence.limit
        self.min_known[slot] = min(sequence.num_prompt + params.min_tokens, sequence.limit)
        self.stops_at_eos[slot] = not params.ignore_eos
        self.own_stops[slot] = bool(sequence.live.stop_tokens)
        self.reports[slot] = not sequence.has_output or params.logprobs is not None
        self.passed[slot] = -1
        self.last_step[slot] = -1
        self.waits[slot] = False
        self.background[slot] = sequence.is_background
        return slot

    def leave(self, sequence: Sequence) -> None:
        """Empty a sequence's slot; samples in flight are void."""
        slot, sequence.slot = sequence.slot, -1
        self.sequences[slot] = None
        self.generation[slot] += 1
        self._free.append(slot)

"""Placement of experts on the ranks of a stage. Needs no torch: leaders place, slices follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Expert of each slot of each rank, in one layer.

    Attributes:
        expert_S: int32 [S], the expert in each slot, rank by rank.
        start_R1: int32 [R + 1], rank r has slots start[r] .. start[r + 1].
    """

    expert_S: npt.NDArray[np.int32]
    start_R1: npt.NDArray[np.int32]

    @classmethod
    def even(cls, sizes: Sequence[int], spare: int = 0) -> ExpertPlacement:
        """Experts in order, `sizes` on each rank, then `spare` copies of the next experts."""
        starts = np.concatenate(([0], np.cumsum(sizes)))
        experts_of_rank = [np.arange(a, b + spare) % starts[-1] for a, b in pairwise(starts)]
        slots = starts + spare * np.arange(len(starts))
        return cls(np.concatenate(experts_of_rank).astype(np.int32), slots.astype(np.int32))

    def on(self, rank: int) -> list[int]:
        """Experts of a rank's slots, in order."""
        experts: list[int] = self.expert_S[self.start_R1[rank] : self.start_R1[rank + 1]].tolist()
        return experts

    def slots_EA(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Slots of each expert, [E, most copies] (repeated to fill), and copies of each, [E]."""
        num_experts = int(self.expert_S.max()) + 1
        slots_of_expert = [np.flatnonzero(self.expert_S == e) for e in range(num_experts)]
        copies = [len(slots) for slots in slots_of_expert]
        assert min(copies) > 0, "every expert has a slot"
        table = np.stack([np.resize(slots, max(copies)) for slots in slots_of_expert])
        return table.astype(np.int64), np.asarray(copies, dtype=np.int64)

"""Placement of experts for given loads: copies of hot experts, and evenly loaded ranks.

A policy without I/O: loads in, placement out. Knows numbers; knows nothing of weights or of how a
placement takes effect.

After DeepSeek's description of its expert load balancer (2025): copies go to the experts with the
highest load a copy; then the heaviest copies are placed first, each on the least loaded rank with
room. Here swaps between the fullest rank and the others follow, and of equal placements the
placement with fewer moved weights is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arriero.shards.layout.expert_placement import ExpertPlacement

Loads = npt.NDArray[np.float64]
WORTH_MOVING = 0.05
"""Smallest reduction of the largest load, as a share of the mean, for a change of placement."""


def rank_loads(loads_E: Loads, placement: ExpertPlacement) -> Loads:
    """Load of each rank, [R]; the copies of an expert share its load evenly."""
    copies_E = np.bincount(placement.expert_S, minlength=len(loads_E))
    share_S = (loads_E / np.maximum(copies_E, 1))[placement.expert_S]
    return np.add.reduceat(share_S, placement.start_R1[:-1])


def imbalance(loads_E: Loads, placement: ExpertPlacement) -> float:
    """Largest rank load over the mean; 1 without load."""
    loads_R = rank_loads(loads_E, placement)
    mean = float(loads_R.mean())
    return float(loads_R.max()) / mean if mean else 1.0


def balanced(
    loads_E: Loads, slots_R: Sequence[int], current: ExpertPlacement | None = None
) -> ExpertPlacement:
    """A placement of all experts on ranks with `slots_R` slots.

    Args:
        loads_E: load of each expert; at least 0.
        slots_R: slots of each rank; the sum is at least the number of experts.
        current: current placement, returned if the new placement is hardly better.

    Raises:
        ValueError: fewer slots than experts, or a rank without a slot.
    """
    num_experts, total = len(loads_E), sum(slots_R)
    if total < num_experts or min(slots_R) < 1:
        raise ValueError(
            f"{num_experts} experts do not fit {list(slots_R)} slots; each needs a slot, and each "
            "rank too"
        )
    most = len(slots_R)
    copies_E = np.ones(num_experts, dtype=np.int64)
    for _ in range(total - num_experts):
        each_E = np.where(copies_E < most, loads_E / copies_E, -1.0)
        copies_E[int(each_E.argmax())] += 1
    share_E = loads_E / copies_E
    experts_R: list[list[int]] = [[] for _ in slots_R]
    sums = np.zeros(len(slots_R))
    order = sorted(range(num_experts), key=lambda expert: (-share_E[expert], expert))
    for expert in (e for e in order for _ in range(copies_E[e])):
        open_ranks = [r for r, experts in enumerate(experts_R) if len(experts) < slots_R[r]]
        # a second copy on the same rank would share no load
        apart = [r for r in open_ranks if expert not in experts_R[r]] or open_ranks
        rank = min(apart, key=lambda r: (sums[r], r))
        experts_R[rank].append(expert)
        sums[rank] += share_E[expert]
    _swap(experts_R, sums, share_E)
    starts = np.concatenate(([0], np.cumsum(slots_R))).astype(np.int32)
    expert_S = np.asarray([e for experts in experts_R for e in experts], dtype=np.int32)
    placement = ExpertPlacement(expert_S, starts)
    if current is None:
        return placement
    gain = imbalance(loads_E, current) - imbalance(loads_E, placement)
    return _keep_slots(placement, current) if gain >= WORTH_MOVING else current


def _swap(experts_R: list[list[int]], sums: Loads, share_E: Loads) -> None:
    """Swap pairs of copies between the fullest rank and another while the peak gets lower."""
    for _ in range(64 * len(experts_R)):
        high = int(sums.argmax())
        best: tuple[float, int, int, int] | None = None
        for low in range(len(experts_R)):
            gap = sums[high] - sums[low]
            for i, a in enumerate(experts_R[high]):
                for j, b in enumerate(experts_R[low]):
                    load = share_E[a] - share_E[b]
                    if not 0 < load < gap or a in experts_R[low] or b in experts_R[high]:
                        continue
                    peak = max(sums[high] - load, sums[low] + load)
                    if best is None or peak < best[0]:
                        best = (peak, low, i, j)
        if best is None:
            return
        _, low, i, j = best
        load = share_E[experts_R[high][i]] - share_E[experts_R[low][j]]
        experts_R[high][i], experts_R[low][j] = experts_R[low][j], experts_R[high][i]
        sums[high] -= load
        sums[low] += load


def _keep_slots(placement: ExpertPlacement, current: ExpertPlacement) -> ExpertPlacement:
    """The same experts on each rank; experts that were there already keep their slots."""
    expert_S = np.full_like(placement.expert_S, -1)
    for start, stop in zip(placement.start_R1[:-1], placement.start_R1[1:], strict=True):
        remaining = placement.expert_S[start:stop].tolist()
        for slot in range(start, stop):
            if current.expert_S[slot] in remaining:
                expert_S[slot] = current.expert_S[slot]
                remaining.remove(int(current.expert_S[slot]))
        for slot in range(start, stop):
            if expert_S[slot] < 0:
                expert_S[slot] = remaining.pop(0)
    return ExpertPlacement(expert_S, placement.start_R1)

"""Where experts should lie, given how much each is asked: hot ones twice, ranks evenly loaded.

A policy without I/O: loads in, placement out. Knows numbers; knows nothing of weights or of how a
placement comes into force.

After DeepSeek's description of its expert load balancer (2025): copies go to the experts with most
load a copy, then the heaviest copies are dealt first, each to the least loaded rank that has room.
Here swaps between the fullest rank and the others follow, and of equal placements the one that
moves fewer weights is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arriero.shards.layout.expert_placement import ExpertPlacement

Loads = npt.NDArray[np.float64]
WORTH_MOVING = 0.05
"""A placement is changed for a largest load that is smaller by at least this share of the mean."""


def rank_loads(loads_E: Loads, placement: ExpertPlacement) -> Loads:
    """Load of each rank, [R], where the copies of an expert share its load evenly."""
    copies_E = np.bincount(placement.expert_S, minlength=len(loads_E))
    share_S = (loads_E / np.maximum(copies_E, 1))[placement.expert_S]
    return np.add.reduceat(share_S, placement.start_R1[:-1])


def imbalance(loads_E: Loads, placement: ExpertPlacement) -> float:
    """Largest rank load over the mean; 1 where nothing is asked."""
    loads_R = rank_loads(loads_E, placement)
    mean = float(loads_R.mean())
    return float(loads_R.max()) / mean if mean else 1.0


def balanced(
    loads_E: Loads, slots_R: Sequence[int], now: ExpertPlacement | None = None
) -> ExpertPlacement:
    """A placement of all experts over ranks with so many slots each.

    Args:
        loads_E: how much each expert is asked; at least 0.
        slots_R: places on each rank, as many in all as experts or more.
        now: the placement in force, kept where the new one would be hardly better.

    Raises:
        ValueError: fewer slots than experts, or a rank without any.
    """
    num_experts, total = len(loads_E), sum(slots_R)
    if total < num_experts or min(slots_R) < 1:
        raise ValueError(
            f"{num_experts} experts do not fit {list(slots_R)} slots, one at least each"
        )
    most = len(slots_R)
    copies_E = np.ones(num_experts, dtype=np.int64)
    for _ in range(total - num_experts):
        each_E = np.where(copies_E < most, loads_E / copies_E, -1.0)
        copies_E[int(each_E.argmax())] += 1
    share_E = loads_E / copies_E
    held: list[list[int]] = [[] for _ in slots_R]
    sums = np.zeros(len(slots_R))
    order = sorted(range(num_experts), key=lambda one: (-share_E[one], one))
    for expert in (one for one in order for _ in range(copies_E[one])):
        open_ranks = [r for r, one in enumerate(held) if len(one) < slots_R[r]]
        # a second copy on one rank would share nothing
        apart = [r for r in open_ranks if expert not in held[r]] or open_ranks
        rank = min(apart, key=lambda r: (sums[r], r))
        held[rank].append(expert)
        sums[rank] += share_E[expert]
    _swap(held, sums, share_E)
    starts = np.concatenate(([0], np.cumsum(slots_R))).astype(np.int32)
    found = ExpertPlacement(np.asarray([e for one in held for e in one], dtype=np.int32), starts)
    if now is None:
        return found
    gain = imbalance(loads_E, now) - imbalance(loads_E, found)
    return _in_place(found, now) if gain >= WORTH_MOVING else now


def _swap(held: list[list[int]], sums: Loads, share_E: Loads) -> None:
    """Swap pairs of copies between the fullest rank and another while that lowers the peak."""
    for _ in range(64 * len(held)):
        high = int(sums.argmax())
        best: tuple[float, int, int, int] | None = None
        for low in range(len(held)):
            gap = sums[high] - sums[low]
            for i, a in enumerate(held[high]):
                for j, b in enumerate(held[low]):
                    moved = share_E[a] - share_E[b]
                    if not 0 < moved < gap or a in held[low] or b in held[high]:
                        continue
                    peak = max(sums[high] - moved, sums[low] + moved)
                    if best is None or peak < best[0]:
                        best = (peak, low, i, j)
        if best is None:
            return
        _, low, i, j = best
        moved = share_E[held[high][i]] - share_E[held[low][j]]
        held[high][i], held[low][j] = held[low][j], held[high][i]
        sums[high] -= moved
        sums[low] += moved


def _in_place(found: ExpertPlacement, now: ExpertPlacement) -> ExpertPlacement:
    """The same experts on each rank, those that were there already in their old slots."""
    expert_S = np.full_like(found.expert_S, -1)
    for start, stop in zip(found.start_R1[:-1], found.start_R1[1:], strict=True):
        wanted = found.expert_S[start:stop].tolist()
        for slot in range(start, stop):
            if now.expert_S[slot] in wanted:
                expert_S[slot] = now.expert_S[slot]
                wanted.remove(int(now.expert_S[slot]))
        for slot in range(start, stop):
            if expert_S[slot] < 0:
                expert_S[slot] = wanted.pop(0)
    return ExpertPlacement(expert_S, found.start_R1)

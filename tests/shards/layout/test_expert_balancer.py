"""The expert balancer: on skewed traces, and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.shards.layout.expert_balancer import balanced, imbalance, rank_loads
from arriero.shards.layout.expert_placement import ExpertPlacement

RANKS, EXPERTS, SPARE = 8, 128, 16


def zipf_trace(seed: int, tokens: int = 200_000, exponent: float = 1.0) -> np.ndarray:
    """Experts asked, token by token: ranks of popularity in random order."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, EXPERTS + 1) ** exponent
    return rng.permutation(EXPERTS)[rng.choice(EXPERTS, tokens, p=weights / weights.sum())]


@pytest.mark.parametrize("seed", range(5))
def test_zipf(seed: int) -> None:
    """Balanced by the trace's first half, measured on its second."""
    trace = zipf_trace(seed)
    half = len(trace) // 2
    seen, coming = (
        np.bincount(part, minlength=EXPERTS).astype(float) for part in (trace[:half], trace[half:])
    )
    before = ExpertPlacement.even([EXPERTS // RANKS] * RANKS)
    after = balanced(seen, [(EXPERTS + SPARE) // RANKS] * RANKS)
    was, now = imbalance(coming, before), imbalance(coming, after)
    print(f"largest rank load / mean: {was:.3f} before, {now:.3f} after")
    assert was > 1.3
    assert now <= 1.15


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.integers(0, 1000), min_size=1, max_size=24),
    spare=st.lists(st.integers(0, 3), min_size=1, max_size=5),
)
def test_every_expert_has_a_slot_and_every_slot_an_expert(
    loads: list[int], spare: list[int]
) -> None:
    ranks = len(spare)
    each = -(-len(loads) // ranks)
    slots = [each + more for more in spare]
    asked = np.asarray(loads, dtype=float)
    found = balanced(asked, slots)
    assert set(found.expert_S.tolist()) == set(range(len(loads)))
    assert found.start_R1.tolist() == [sum(slots[:r]) for r in range(ranks + 1)]
    assert rank_loads(asked, found).sum() == pytest.approx(asked.sum())
    # the same loads again: nothing moves
    assert balanced(asked, slots, found) is found


def test_what_stays_keeps_its_slot() -> None:
    now = ExpertPlacement.even([4, 4])
    loads = np.asarray([9.0, 9, 9, 1, 1, 1, 1, 1])
    after = balanced(loads, [4, 4], now)
    kept = (after.expert_S == now.expert_S).sum()
    assert imbalance(loads, after) == 1.25 < imbalance(loads, now)
    assert kept >= 4

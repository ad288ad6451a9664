"""Where experts lie."""

from __future__ import annotations

import torch

from arriero.shards.layout.expert_placement import ExpertPlacement


def test_copies_take_turns() -> None:
    slots, copies = ExpertPlacement.even([2, 1]).slots_EA()
    assert slots.tolist() == [[0], [1], [2]] and copies.tolist() == [1, 1, 1]
    twice = ExpertPlacement(
        torch.tensor([0, 1, 0, 2], dtype=torch.int32).numpy(),
        torch.tensor([0, 2, 4], dtype=torch.int32).numpy(),
    )
    slots, copies = twice.slots_EA()
    assert slots.tolist() == [[0, 2], [1, 1], [3, 3]] and copies.tolist() == [2, 1, 1]
